"""Queries, keys and values of real attention: a trained text encoder read layer by layer.

The encoder is all-MiniLM-L6-v2 (Wang et al., arXiv 2002.10957; sentence-transformers), a BERT of six layers; `regard data get minilm` fetches it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..errors import RegardError
from .packages import fetched

HEADS, LAYERS, LONGEST = 12, 6, 512


def tokens_of(text: str, length: int, folder: Path | None = None) -> Tensor:
    """`text` as rows of `length` token numbers, (rows, length); what is left over at the end is dropped.

    Raises:
        RegardError: the package `tokenizers` is missing, or the model was not fetched.
    """
    folder = fetched("minilm") if folder is None else folder
    try:
        from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError:
        raise RegardError("reading text for the encoder needs the package tokenizers: pip install tokenizers") from None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    numbers = tokenizer.get_vocab()
    inside = length - 2
    if not 0 < inside <= min(len(ids), LONGEST - 2):
        raise RegardError(f"length={length} must be from 3 to {LONGEST}, and the text has {len(ids)} tokens")
    rows = ids[: len(ids) // inside * inside].view(-1, inside)
    ends = [rows.new_full((len(rows), 1), number) for number in (numbers["[CLS]"], numbers["[SEP]"])]
    return torch.cat((ends[0], rows, ends[1]), 1)


@torch.no_grad()
def attention_inputs(tokens: Tensor, folder: Path | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The queries, keys and values of every layer, (rows, 12, length, 32) each, for token numbers (rows, length)."""
    w = load_file((fetched("minilm") if folder is None else folder) / "model.safetensors")

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.LayerNorm.weight"], w[f"{name}.LayerNorm.bias"], 1e-12)

    words = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(words + w["embeddings.position_embeddings.weight"][: tokens.shape[1]], "embeddings")
    found = []
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        parts = (linear(x, f"{at}.attention.self.{part}") for part in ("query", "key", "value"))
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in parts)
        found.append((q, k, v))
        gathered = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = norm(x + linear(gathered, f"{at}.attention.output.dense"), f"{at}.attention.output")
        x = norm(x + linear(F.gelu(linear(x, f"{at}.intermediate.dense")), f"{at}.output.dense"), f"{at}.output")
    return found
