"""`moe-kit generate DIR --prompt TEXT`: answer with a saved adapter."""

from __future__ import annotations

import tyro

from moe_kit.commands.options import quiet_libraries
from moe_kit.errors import ConfigError

__all__ = ["generate", "main"]


def main(arguments: list[str]) -> None:
    """Parse the options and generate.

    Args:
        arguments: Words after `moe-kit generate`.
    """
    tyro.cli(generate, args=arguments, prog="moe-kit generate")


def generate(
    folder: tyro.conf.Positional[str],
    *,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    base: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> str:
    """Answer a prompt with a saved adapter, streaming the text to the terminal.

    Args:
        folder: Output folder of `moe-kit train`.
        prompt: What to ask; the chat template and system prompt of the recipe are put around it.
        max_new_tokens: Longest answer in tokens.
        temperature: 0 takes the likeliest token; higher values sample.
        seed: Seed for sampling.
        base: Answer with the base model, the adapter switched off, to see the difference.

    Returns:
        The answer.

    Raises:
        ConfigError: An option is out of range.
        CheckpointError: The folder holds no finished run.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"got max_new_tokens {max_new_tokens} and temperature {temperature}, expected at least 1 and at least 0"
        )
    if not prompt.strip():
        raise ConfigError("the prompt is empty: give --prompt TEXT")
    quiet_libraries()
    import contextlib

    import torch
    from transformers import TextStreamer

    from moe_kit.training.data import Example
    from moe_kit.training.encoding import encode_prompt
    from moe_kit.training.run import load_run

    model, tokenizer, recipe = load_run(folder)
    example = Example(example_id="prompt", task="", messages=({"role": "user", "content": prompt},), answer="")
    ids = torch.tensor([encode_prompt(example, tokenizer, recipe.data)], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    with torch.no_grad(), model.disable_adapter() if base else contextlib.nullcontext():
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
