"""Build from the checkout alone: setuptools would add the modules that an earlier build left in ``build/lib``."""

import shutil
from pathlib import Path

from setuptools import setup

earlier = Path(__file__).with_name("build") / "lib"
if earlier.exists():
    shutil.rmtree(earlier)
setup()
