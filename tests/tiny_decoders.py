"""Language models for the command line's ``module:function``, with a tokenizer of letters."""

from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 40


class Letters:
    """A tokenizer of single letters: 0 pads, 1 begins, 2 ends."""

    pad_token_id, bos_token_id, eos_token_id, model_max_length = 0, 1, 2, 48

    def __call__(self, text: Any = None, text_target: Any = None, max_length: int = 48, **_: Any) -> dict[str, Any]:
        texts = text_target if text is None else text
        texts = [texts] if (single := isinstance(texts, str)) else texts
        rows = [[3 + ord(letter) % (VOCABULARY - 3) for letter in entry[:max_length]] for entry in texts]
        if single:
            return {"input_ids": rows[0], "attention_mask": [1] * len(rows[0])}
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        """The texts, in small letters and signs of which each stands for its token."""
        size = VOCABULARY - 3
        return ["".join(chr(96 + (int(token) - 3 - 96) % size) for token in row if token > 2) for row in rows]


def causal() -> nn.Module:
    """A decoder of two blocks."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=48, **sizes))
    model.processor = Letters()
    return model


def seq2seq() -> nn.Module:
    """An encoder and a decoder of one block each."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
        model = hf.T5ForConditionalGeneration(config)
    model.processor = Letters()
    return model
