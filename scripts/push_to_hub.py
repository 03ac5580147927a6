"""Push a Kimi Linear checkpoint folder to the Hub, with a model card.

The folder is checked first: config, code, every tensor of every shard, tokenizer. These files are
pushed, with README.md and its images, a licence and results; the rest is named and stays. A
README.md that is there already, in the folder or in the repository, is kept unless
--overwrite-card is given. The token is the one of `hf auth login` or of HF_TOKEN; another server
than the public Hub is chosen with HF_ENDPOINT.

Examples:
    python scripts/push_to_hub.py runs/demo --repo-id me/kimi-linear-demo --dry-run
    python scripts/push_to_hub.py runs/demo --repo-id me/kimi-linear-demo --private \\
        --metrics runs/demo/eval_results.json --dataset roneneldan/TinyStories --license mit
    python scripts/push_to_hub.py runs/demo/checkpoint-500 --repo-id me/kimi-linear-demo \\
        --revision step-500 --message "After 500 steps"
"""

import argparse
import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from generating.terminal import shown
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from publishing.files import CARD, files_to_push, matching_files
from publishing.folder import Checkpoint, check_folder, check_weight_values
from publishing.model_card import Statements, model_card, read_metrics

from kimi_linear.checkpoints.folders import INDEX, WEIGHTS

# Weights of an earlier push that this one does not have would be loaded instead, or lie around.
STALE = (WEIGHTS, "model-?????-of-?????.safetensors", INDEX)

# Characters of a server's answer in a message.
MAX_ERROR = 400
# What to do about a refusal, by its status.
HINTS = {
    401: "the token is not valid: `hf auth login`, or HF_TOKEN",
    403: "the token may not write there",
    404: "there is no such repository, or the token may not see it",
    409: "something else is changing the repository: try again",
    412: "something else has changed the repository: try again",
}


class PushError(RuntimeError):
    """The server refused a push, or could not be reached; the message is one line."""


def main(
    *,
    path: str | os.PathLike[str],
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload Kimi Linear model",
    metrics: str | os.PathLike[str] | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    languages: Sequence[str] = (),
    base_model: str | None = None,
    overwrite_card: bool = False,
    include: Sequence[str] = (),
    check_values: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> str | None:
    """Check a checkpoint folder, write its card and push it.

    Args:
        path: The folder.
        repo_id: Where to: `user/name`, or `name` for one's own namespace.
        private: Make the repository private if it does not exist yet.
        revision: Branch, made if need be; None for main.
        message: First line of the commit.
        metrics: JSON file with measured values, see `read_metrics`.
        datasets: Training data: Hub ids, or words.
        license: The weights' licence.
        languages: Language codes.
        base_model: Hub id of the model that this one was trained from.
        overwrite_card: Replace a README.md that is there already.
        include: Patterns of files to push that are no part of a model.
        check_values: Read all weights and refuse NaN and Inf.
        dry_run: Only check, and print what would be pushed; write nothing, ask no server.
        endpoint: Server; None for HF_ENDPOINT or the public Hub.
        token: Access token; None for the one of the login or of HF_TOKEN.

    Returns:
        The address of what was pushed; None after a dry run.

    Raises:
        ValueError: The folder is not complete, or an argument is wrong.
        PushError: The server refused, or could not be reached.
    """
    validate_repo_id(repo_id)
    measured = read_metrics(metrics) if metrics is not None else []
    statements = Statements(measured, datasets, license, languages, base_model)
    checkpoint = check_folder(path)
    if check_values:
        check_weight_values(checkpoint.folder)
    print(f"{checkpoint.folder}: {len(checkpoint.shapes)} tensors, complete", flush=True)
    if dry_run:
        _print_plan(checkpoint, repo_id, statements, overwrite_card, include)
        return None
    if token is None and get_token() is None:
        raise ValueError("token is None; allowed: a write token, from `hf auth login` or HF_TOKEN")
    matching_files(checkpoint.folder, include)  # before anything is made on the server
    api = HfApi(endpoint=endpoint, token=token)
    with _one_line_errors(repo_id):
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        _put_card(api, checkpoint, url.repo_id, revision, statements, overwrite_card)
        _upload(api, checkpoint, url.repo_id, revision, message, include)
    address = str(url) if revision is None else f"{url}/tree/{revision}"
    print(address)
    return address


def _upload(
    api: HfApi,
    checkpoint: Checkpoint,
    repo_id: str,
    revision: str | None,
    message: str,
    include: Sequence[str],
) -> None:
    names = files_to_push(checkpoint, include)
    size = sum((checkpoint.folder / name).stat().st_size for name in names)
    print(f"pushing {len(names)} files, {size / 1e6:,.1f} MB", flush=True)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=checkpoint.folder,
        revision=revision,
        commit_message=message,
        allow_patterns=[glob.escape(name) for name in names],
        delete_patterns=list(STALE),
    )


@contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """PushError for what requests end with: refusals, broken connections, uploads that failed."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # uploads raise RuntimeError from the cause
        cause = error if isinstance(error, HTTPError) else error.__cause__ or error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        hint = f"{HINTS[status]}. " if status in HINTS else ""
        text = shown(" ".join(f"{type(cause).__name__}: {cause}".split()))[:MAX_ERROR]
        raise PushError(f"{repo_id} was not pushed: {hint}{text}") from error


def _print_plan(
    checkpoint: Checkpoint,
    repo_id: str,
    statements: Statements,
    overwrite_card: bool,
    include: Sequence[str],
) -> None:
    """Say what a push would do."""
    names = files_to_push(checkpoint, include, keeps_card=not overwrite_card)
    kept = CARD in names and not overwrite_card
    print(f"to {repo_id}:")
    for name in names:
        print(f"  {shown(name)}  {(checkpoint.folder / name).stat().st_size:,} bytes")
    if kept:
        print(f"{CARD} stays as it is")
    else:
        card = model_card(repo_id, checkpoint.config, checkpoint.shapes, statements)
        print(f"{CARD} would be:\n\n{card}")


def _put_card(
    api: HfApi,
    checkpoint: Checkpoint,
    repo_id: str,
    revision: str | None,
    statements: Statements,
    overwrite_card: bool,
) -> None:
    """Write the card into the folder, unless there is one here or in the repository."""
    file = checkpoint.folder / CARD
    if not overwrite_card:
        place = str(file) if file.exists() else None
        if place is None and api.file_exists(repo_id, CARD, revision=revision):
            place = f"the one of {repo_id}"
        if place is not None:
            print(f"{CARD}: kept {place} (--overwrite-card replaces it)", flush=True)
            return
    card = model_card(repo_id, checkpoint.config, checkpoint.shapes, statements)
    file.write_text(card, encoding="utf-8")
    print(f"{CARD}: written to {file}", flush=True)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's flags, as `main` wants them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="folder with the saved model and tokenizer")
    parser.add_argument("--repo-id", required=True, help="user/name")
    parser.add_argument("--private", action="store_true", help="if the repository is new")
    parser.add_argument("--revision", help="branch, made if need be (default: main)")
    parser.add_argument("--message", default="Upload Kimi Linear model", help="of the commit")
    parser.add_argument("--metrics", help="JSON file with measured values for the card")
    parser.add_argument(
        "--dataset",
        dest="datasets",
        action="append",
        default=[],
        help="training data, a Hub id or words; may be repeated",
    )
    parser.add_argument("--license", help="the weights' licence, such as mit")
    parser.add_argument(
        "--language", dest="languages", action="append", default=[], help="such as en"
    )
    parser.add_argument("--base-model", help="Hub id of the model this one was trained from")
    parser.add_argument("--overwrite-card", action="store_true", help="replace README.md")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        help="files to push too, such as 'figures/*.png'; * stays in one folder, without dot files",
    )
    parser.add_argument(
        "--check-values", action="store_true", help="read all weights, refuse NaN and Inf"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print only")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(**vars(parse_args()))
    except (ValueError, PushError) as error:
        raise SystemExit(f"error: {error}") from error
