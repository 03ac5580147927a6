"""Convert `tiktoken.model` into a fast tokenizer that loads without custom code.

tiktoken joins, in every piece of text, the adjacent pair whose concatenation has the lowest rank.
`tokenizers` joins listed pairs instead. Both give the same ids once every token lists the one pair
that tiktoken can join it from: running tiktoken's own rule inside the token's bytes until two parts
are left. That pair is unique, because the merges inside a token happen in the same order wherever
it stands, as long as none crosses its border. A token that the rule never reaches is only ever
found as a whole piece, in tiktoken and, with `ignore_merges`, in `tokenizers`.

The special tokens are kept out of the BPE vocabulary on purpose: there, a piece of plain text that
spells one would become one.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from kimi_linear.tokenizer.answers import response_template
from kimi_linear.tokenizer.byte_level import bytes_to_chars
from kimi_linear.tokenizer.chat import chat_template
from kimi_linear.tokenizer.special_tokens import (
    BOS_TOKEN,
    CHAT_EOS_TOKEN,
    EOS_TOKENS,
    NAMED_OFFSETS,
    NOT_SPECIAL,
    NUM_SPECIAL_TOKENS,
    PAD_TOKEN,
    PATTERN,
    UNK_TOKEN,
    special_token_ids,
)
from kimi_linear.tokenizer.tiktoken_format import check_ranks, load_tiktoken, save_tiktoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_FILE = "tiktoken.model"


def make_pre_tokenizer() -> PreTokenizer:
    """The split by the pattern, followed by the byte-level mapping."""
    split = Split(Regex(PATTERN), behavior="isolated")
    return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Find the pair that each token of two or more bytes is merged from.

    Args:
        ranks: token bytes to rank.

    Returns:
        The pairs in the order of their tokens' ranks. Tokens that no sequence of merges reaches
        have none.
    """
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return [pair for token, _ in by_rank for pair in _last_pair(token, ranks)]


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two parts that are left before the last merge inside a token, if it gets that far."""
    never = len(ranks)
    parts = [token[i : i + 1] for i in range(len(token))]
    pair_ranks = [ranks.get(token[i : i + 2], never) for i in range(len(token) - 1)]
    while len(parts) > 2:
        rank = min(pair_ranks)
        if rank == never:
            return
        at = pair_ranks.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del pair_ranks[at]
        if at > 0:
            pair_ranks[at - 1] = ranks.get(parts[at - 1] + parts[at], never)
        if at < len(pair_ranks):
            pair_ranks[at] = ranks.get(parts[at] + parts[at + 1], never)
    if len(parts) == 2:
        yield parts[0], parts[1]


def build_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """Build the fast tokenizer: pattern, byte-level BPE, 256 special ids.

    Args:
        ranks: token bytes to rank, a complete vocabulary.

    Returns:
        A `tokenizers.Tokenizer` with the ids of `tiktoken` over the same ranks. It adds no token
        that the text does not spell.

    Raises:
        ValueError: the vocabulary is incomplete (see `check_ranks`), or spells a special token.
    """
    check_ranks(ranks)
    expected = special_token_ids(len(ranks))
    for name in expected:
        if name.encode() in ranks:
            raise ValueError(
                f"ranks[{name.encode()!r}] is {ranks[name.encode()]}, but {name} is the special "
                f"token {expected[name]}; allowed: tokens that spell no special token"
            )
    chars = bytes_to_chars()
    text_of = {token: "".join(chars[byte] for byte in token) for token in ranks}
    model = BPE(
        vocab={text_of[token]: rank for token, rank in ranks.items()},
        merges=[(text_of[left], text_of[right]) for left, right in recover_merges(ranks)],
        ignore_merges=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = make_pre_tokenizer()
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_tokens([_added_token(name) for name in expected])
    for name, token_id in expected.items():
        assert tokenizer.token_to_id(name) == token_id, (name, token_id)
    return tokenizer


def convert_tiktoken(
    path_or_ranks: str | os.PathLike[str] | dict[bytes, int],
    output_dir: str | os.PathLike[str],
    *,
    eos_token: str = CHAT_EOS_TOKEN,
    model_max_length: int = 1_048_576,
    vocab_size: int | None = None,
) -> "PreTrainedTokenizerFast":
    """Write a tokenizer folder that `AutoTokenizer` loads without custom code.

    The folder gets `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`,
    `chat_template.jinja` and, for engines that read it, `tiktoken.model`.

    Args:
        path_or_ranks: a `tiktoken.model` file, kept byte for byte, or token bytes to rank.
        output_dir: the folder to write into, created if need be.
        eos_token: what ends an answer: `<|im_end|>` for chat models, `[EOS]` for base models.
        model_max_length: the context length in tokens that the tokenizer announces.
        vocab_size: if given, the ids that the tokenizer must have, the 256 special ones included;
            163,840 for the official file.

    Returns:
        The tokenizer, loaded from the folder.

    Raises:
        ValueError: an argument out of range, a malformed file, another size than `vocab_size`, or
            chat templates in the folder that would be taken instead.
        FileNotFoundError: there is no such file.
    """
    if eos_token not in EOS_TOKENS:
        raise ValueError(f"eos_token is {eos_token!r}; allowed: {', '.join(EOS_TOKENS)}")
    if not isinstance(model_max_length, int) or model_max_length < 1:
        raise ValueError(f"model_max_length is {model_max_length!r}; allowed: an integer >= 1")
    source = None if isinstance(path_or_ranks, dict) else Path(path_or_ranks)
    ranks = path_or_ranks if isinstance(path_or_ranks, dict) else load_tiktoken(path_or_ranks)
    total = len(ranks) + NUM_SPECIAL_TOKENS
    if vocab_size is not None and total != vocab_size:
        name = source or "ranks"
        raise ValueError(f"{name} gives {total} ids; allowed: vocab_size, which is {vocab_size}")
    tokenizer = build_tokenizer(ranks)
    output = Path(output_dir)
    others = output / "additional_chat_templates"
    if others.exists():
        raise ValueError(f"{others} holds chat templates of another tokenizer; remove it first")
    roles = _roles(eos_token)
    config = _tokenizer_config(len(ranks), roles, model_max_length)
    with replacing_files(output) as folder:
        if source is None or not _is_same(source, output):
            _write_vocab_file(source, ranks, folder / VOCAB_FILE)
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(folder / "special_tokens_map.json", roles)
        _write_json(folder / "tokenizer_config.json", config)
        (folder / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    return _load(output)


@contextlib.contextmanager
def replacing_files(output: Path) -> Iterator[Path]:
    """A folder whose files take their places in `output` at the end, if nothing goes wrong.

    A file there that is a link, as in the cache of the Hub, is replaced and not written through.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".tokenizer-") as made:
        yield Path(made)
        for path in Path(made).iterdir():
            target = output / path.name
            if path.is_dir() and target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            path.replace(target)


def _is_same(source: Path, output: Path) -> bool:
    """Whether the vocabulary file is in its place already, itself or through a link."""
    target = output / VOCAB_FILE
    return target.exists() and target.samefile(source)


def _write_vocab_file(source: Path | None, ranks: dict[bytes, int], target: Path) -> None:
    """Write `tiktoken.model`: a copy of its source where there is one."""
    if source is None:
        save_tiktoken(ranks, target)
    else:
        shutil.copyfile(source, target)


def _load(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder. Transformers is imported here: training needs none of it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _added_token(name: str) -> AddedToken:
    """A token matched exactly as it is spelled, no white space taken along."""
    return AddedToken(name, special=name not in NOT_SPECIAL, normalized=False)


def _roles(eos_token: str) -> dict[str, Any]:
    """The special tokens by role; those without a role are listed, as skipping them needs it."""
    roles = {
        "bos_token": BOS_TOKEN,
        "eos_token": eos_token,
        "pad_token": PAD_TOKEN,
        "unk_token": UNK_TOKEN,
    }
    others = [n for n in NAMED_OFFSETS if n not in NOT_SPECIAL and n not in roles.values()]
    return roles | {"additional_special_tokens": others}


def _tokenizer_config(
    num_ranks: int, roles: dict[str, Any], model_max_length: int
) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(token_id): {"content": name, **flags, "special": name not in NOT_SPECIAL}
        for name, token_id in special_token_ids(num_ranks).items()
    }
    return {
        "added_tokens_decoder": added,
        **roles,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model_max_length,
        "response_template": response_template(roles["eos_token"]),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as Transformers does."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
