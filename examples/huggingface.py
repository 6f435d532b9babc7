"""fastattn in Hugging Face transformers: attention by name, norms and MLPs by convert. Runs offline on a random model.

pip install transformers
python examples/huggingface.py [folder or name of a causal language model]
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastattn
import fastattn.integrations.huggingface


def load(name: str | None) -> torch.nn.Module:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager").eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def timed(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits of a padded batch, and the seconds of the fastest of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        logits = model(tokens, attention_mask=mask).logits
        seconds.append(time.perf_counter() - start)
    return logits, min(seconds)


def main(name: str | None = None, length: int = 512) -> None:
    model = load(name)
    tokens = torch.randint(3, model.config.vocab_size, (2, length))
    mask = torch.ones_like(tokens)
    mask[1, : length // 5] = 0  # padding on the left, as for generation

    expected, eager_seconds = timed(model, tokens, mask)
    model.set_attn_implementation("fastattn")
    fastattn.convert(model)
    print(fastattn.conversion_report(model))

    logits, seconds = timed(model, tokens, mask)
    distance = (logits - expected)[mask.bool()].abs().max()
    print(f"\nlargest difference of a logit: {distance:.1e} (largest logit {expected.abs().max():.1e})")
    print(
        f"eager {eager_seconds * 1e3:.0f} ms, fastattn {seconds * 1e3:.0f} ms: {eager_seconds / seconds:.2f} times as fast"
    )

    prompt = tokens[:1, :8]
    continued = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    print("20 more tokens:", continued[0, 8:].tolist())


if __name__ == "__main__":
    main(*sys.argv[1:2])
