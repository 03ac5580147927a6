"""Turn the `tiktoken.model` of a downloaded model into a tokenizer that loads without custom code.

OUTPUT gets `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`,
`chat_template.jinja` and a copy of `tiktoken.model`. The ids are tiktoken's, on every input. It may
be the folder that `add_code.py` made, or SNAPSHOT itself; files that are links, as in the cache of
the Hub, are replaced and never written through.

Examples:
    hf download moonshotai/Kimi-Linear-48B-A3B-Instruct --local-dir official
    python scripts/add_code.py official --output kimi-linear-48b
    python scripts/convert_tokenizer.py official --output kimi-linear-48b
    python scripts/convert_tokenizer.py runs/base --output runs/base --eos-token '[EOS]'
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from kimi_linear.tokenizer.snapshot import convert_snapshot
from kimi_linear.tokenizer.special_tokens import EOS_TOKENS


def main(
    *,
    snapshot: str | os.PathLike[str],
    output: str | os.PathLike[str],
    eos_token: str | None = None,
) -> Path:
    """Convert the tokenizer of a snapshot.

    Args:
        snapshot: Folder with `tiktoken.model`.
        output: Folder to write into, made if need be.
        eos_token: What ends an answer; None: as the snapshot says.

    Returns:
        The output folder.

    Raises:
        ValueError: As `kimi_linear.tokenizer.snapshot.convert_snapshot`.
    """
    tokenizer = convert_snapshot(snapshot, output, eos_token=eos_token)
    print(f"{output}: {len(tokenizer):,} tokens, answers end with {tokenizer.eos_token}")
    return Path(output)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, its names being those of `main`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("snapshot", help="folder with tiktoken.model")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--eos-token", choices=EOS_TOKENS, help="else as the snapshot says")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(**vars(parse_arguments()))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
