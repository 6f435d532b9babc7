"""A small Llama-family GGUF file, written by the ``gguf`` package's own writer."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

from fastattn.models import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=261, dim=64, nlayers=2, nheads=4, nheads_kv=2, ffn_dim=96, max_seq_len=64, rope_theta=5000.0,
    rope_interleaved=True, norm_eps=1e-6,
)  # fmt: skip
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in byte order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in visible else chr(next(hidden)) for b in range(256)]


def permute_to_neighbours(weight: torch.Tensor, nheads: int) -> torch.Tensor:
    """What llama.cpp's converter does to Wq and Wk: row i + j·R/2 of a head becomes row 2i + j."""
    rows, columns = weight.shape
    return weight.reshape(nheads, 2, rows // nheads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write(path: Path, weights: dict[str, torch.Tensor], quantization: str = "F32", **changes: object) -> Path:
    """A Llama-family GGUF of CONFIG; ``changes`` replace metadata (None leaves the key out)."""
    writer = gguf.GGUFWriter(str(path), str(changes.pop("architecture", "llama")))
    metadata = {
        "block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    } | {k: v for k, v in changes.items() if isinstance(v, int | None)}  # fmt: skip
    for key, value in metadata.items():
        if value is not None:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    writer.add_string("llama.rope.scaling.type", str(changes.get("rope_scaling", "none")))
    writer.add_tokenizer_model(str(changes.get("tokenizer", "gpt2")))
    writer.add_tokenizer_pre(str(changes.get("pre", "smollm")))
    letters = byte_alphabet()
    writer.add_token_list([*letters, "th", "the", "Ġthe", "<|im_start|>", "<|im_end|>"])
    writer.add_token_types([1] * 259 + [3, 3])
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(260)
    writer.add_chat_template(TEMPLATE)
    for name, weight in weights.items():
        if quantization == "F32" or weight.dim() == 1:
            writer.add_tensor(name, weight.numpy())
        else:
            kind = gguf.GGMLQuantizationType[quantization]
            data = gguf.quants.quantize(weight.numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def file_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under GGUF's names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"token_embd.weight": (261, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64),
                "attn_output": (64, 64), "ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64),
                "ffn_down": (64, 96),
            }.items()
        }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
