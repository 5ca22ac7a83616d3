"""The number of compiled products of matrices that oneDNN caches in a training process, and torch beside it.

By default each caches 1024, at a quarter of a megabyte each, and every batch length needs about thirty: a run with many
lengths would hold hundreds of megabytes. One that is made again takes half a millisecond.
"""

import os

from adaptkit.models.memory import KEPT_PRODUCTS


def limit_product_cache() -> None:
    """Limit both caches, unless the user did; call it before the first product.

    torch asks oneDNN for every product all the same, so that its own cache saves no compilation.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")  # torch's
