"""Publish an artifact to the Hub, after all steps that need not wait for it, and only if every gate passed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from adaptkit.checkpoint.manifest import read_manifest
from adaptkit.checkpoint.signing import Signer
from adaptkit.errors import UsageError
from adaptkit.hub.names import check_repo_id
from adaptkit.hub.options import PublishOptions
from adaptkit.hub.publish import PublishReport, check_publishable, publish
from adaptkit.pipeline.steps._kind import Input, Outcome, StepKind, Work
from adaptkit.wording import counted, size


@dataclass(frozen=True, kw_only=True)
class PublishStep(PublishOptions):
    """Options of publishing.

    Attributes:
        repo: org/name.
        sign: whether to sign the manifest; the credentials are given to the run, not in the recipe.
    """

    repo: str
    sign: bool = False

    def validate(self) -> None:
        """See ``Settings``."""
        super().validate()
        check_repo_id(self.repo)


def _precheck(options: PublishStep, signer: Signer, note: Callable[[str], None]) -> None:
    check_publishable(options.repo, _signed_by(options, signer), note)


def _signed_by(options: PublishStep, signer: Signer) -> PublishStep:
    return replace(options, signer=signer) if options.sign else options


def _run(work: Work) -> Outcome:
    report = _publish(work, dry_run=False)
    facts = {name: value for name, value in asdict(report).items() if not name.startswith("files_")}
    facts["deletions"] = len(report.files_deleted)
    return Outcome(f"{_target(report)}, commit {str(report.commit)[:12]}: {_sent(report)}", facts)


def _rehearse(work: Work) -> str:
    report = _publish(work, dry_run=True)
    return f"{_target(report)}: {_sent(report)}"


def _publish(work: Work, dry_run: bool) -> PublishReport:
    options: PublishStep = work.options
    return publish(
        work.path("publish"),
        options.repo,
        _signed_by(options, work.signer),
        dry_run=dry_run,
        progress=work.progress,
        note=work.note,
    )


def _target(report: PublishReport) -> str:
    if report.pull_request is not None:
        return f"{report.repo_id}, pull request {report.pull_request}"
    place = report.tag or (report.branch if report.branch != "main" else "")
    return f"{report.repo_id}@{place}" if place else report.repo_id


def _sent(report: PublishReport) -> str:
    if report.already_there:
        return "already there"
    deleted = f", {counted(len(report.files_deleted), 'deletion')}" if report.files_deleted else ""
    return f"{counted(len(report.files_added), 'file')}, {size(report.bytes_sent)} sent{deleted}"


def _require_manifest(folder: Path) -> None:
    if read_manifest(folder) is None:
        raise UsageError(f"{folder}: has no manifest", hint="add an adopt step, and publish what it makes")


KIND = StepKind(
    inputs=(Input("publish", required=True, check=_require_manifest),),
    options=PublishStep,
    run=_run,
    refused={"signer": "write sign: true, and pass the key to the command with --sign KEY"},
    precheck=_precheck,
    rehearse=_rehearse,
)
