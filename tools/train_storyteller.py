"""Trains and saves the small model that comes with hsrpc, hsrpc/models/storyteller.

Everything is made from one seed: the stories (storyteller.py), the tokenizer and the weights. One core needs 20 to 25
minutes with bfloat16 instructions, and about an hour without.

Example:
    python tools/train_storyteller.py --steps 2400 --seed 1 --out hsrpc/models/storyteller
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from storyteller import Storyteller
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

EOS = "</s>"
SPECIAL_TOKENS = ["<s>", "<pad>", EOS]
"""Ids 0, 1, 2, as in OPT: `</s>` begins every prompt and ends every story."""
CONTEXT_LENGTH = 512
BATCH_SHAPES = ((12, 256), (12, 256), (6, 512))
"""(rows, tokens), in turn: the long rows train the later positions."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over all 256 bytes: any text comes back from its tokens exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A $B", special_tokens=[(EOS, SPECIAL_TOKENS.index(EOS))]
    )
    return tokenizer


class Packer:
    """Rows of token ids: whole texts one after the other, each after `</s>`, cut at the end of the row."""

    def __init__(self, storyteller: Storyteller, tokenizer: Tokenizer) -> None:
        self.storyteller = storyteller
        self.tokenizer = tokenizer

    def batch(self, num_rows: int, num_tokens: int) -> torch.Tensor:
        return torch.tensor([self.row(num_tokens) for _ in range(num_rows)])

    def row(self, num_tokens: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < num_tokens:
            ids += self.encode(self.storyteller.text())
        return ids[:num_tokens]

    def encode(self, text: str) -> list[int]:
        """Token ids after `</s>`; a quarter of the texts are cut at a random character first, as prompts are."""
        rng = self.storyteller.rng
        cut = rng.randrange(len(text)) if rng.random() < 0.25 else 0
        parts = self.tokenizer.encode_batch([text[:cut], text[cut:]], add_special_tokens=False)
        return [SPECIAL_TOKENS.index(EOS), *parts[0].ids, *parts[1].ids]


def make_model(vocab_size: int, hidden_size: int = 256) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        word_embed_proj_dim=hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=4 * hidden_size,
        max_position_embeddings=CONTEXT_LENGTH,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    return OPTForCausalLM(config)


def make_optimizers(model: OPTForCausalLM, rate: float) -> tuple[Optimizer, Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and biases."""
    layers = model.model.decoder.layers
    matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
    ids = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in ids]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak rate: warm-up over 100 steps, then cosine decay to a fiftieth."""
    return min((step + 1) / 100, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def train(model: OPTForCausalLM, packer: Packer, steps: int, peak_rate: float = 3e-3) -> None:
    """Trains in bfloat16 with float32 weights; shows the loss every 50 steps."""
    optimizers = make_optimizers(model, peak_rate)
    schedules = [LambdaLR(optimizer, lambda step: rate_factor(step, steps)) for optimizer in optimizers]
    model.train()
    for step in (progress := tqdm(range(steps), desc="train", mininterval=5)):
        ids = packer.batch(*BATCH_SHAPES[step % len(BATCH_SHAPES)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0 or step == steps - 1:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def save(model: OPTForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=SPECIAL_TOKENS[1],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
    )
    fast.save_pretrained(out)
    model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=2, pad_token_id=1)
    model.to(torch.float16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400, help="training steps of 3072 tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of stories and weights (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=1536, help="tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    storyteller = Storyteller(args.seed)
    tokenizer = train_tokenizer((storyteller.text() for _ in range(5000)), args.vocab_size)
    model = make_model(tokenizer.get_vocab_size())
    train(model, Packer(storyteller, tokenizer), args.steps)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
