"""Trains, evaluates and saves the small model that comes with hsrpc, hsrpc/models/storyteller.

Everything is made from one seed: the stories (storyteller.py), the dialogues about them (storyteller_chat.py), the
tokenizer and the weights. A GPU of 2024 needs about four minutes, with fifteen processes that write the texts.

Example:
    python tools/train_storyteller.py --device cuda --workers 15 --out hsrpc/models/storyteller
"""

from __future__ import annotations

import argparse
import math
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from storyteller import Storyteller
from storyteller_chat import Dialogue, Turn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

EOS, TURN, END_OF_TURN = "</s>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = ["<s>", "<pad>", EOS, TURN, END_OF_TURN]
"""Ids 0, 1, 2, as in OPT: `</s>` begins every prompt and ends every story. Ids 3, 4: begin and end of a turn."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT_LENGTH = 512
DIALOGUES = 0.5
"""Share of the texts that are dialogues; the others are bare."""
README = Path(__file__).with_name("storyteller_readme.md")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=SPECIAL_TOKENS[1],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
    )


def tokenizer_texts(seed: int, num_texts: int) -> Iterator[str]:
    """Bare texts, and what is said in as many dialogues, with the names of the roles."""
    writer = Storyteller(f"{seed}/tokenizer")
    for _ in range(num_texts):
        yield writer.text()
        yield from (f"{turn.role}\n{turn.content}" for turn in Dialogue(writer).write())


def ids_of(tokenizer: PreTrainedTokenizerFast, turns: Iterable[Turn], add_generation_prompt: bool = False) -> list[int]:
    """Token ids of a dialogue by the chat template."""
    ids: list[int] = tokenizer.apply_chat_template(
        [turn.message() for turn in turns], add_generation_prompt=add_generation_prompt, return_dict=False
    )
    return ids


class Batches(Dataset[torch.Tensor]):
    """One batch of token ids for each step, (rows, CONTEXT_LENGTH), int16; each is made from the seed and its number.

    A row is whole texts one after the other, each after `</s>`, cut at the end of the row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, num_rows: int) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.steps = steps
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> torch.Tensor:
        writer = Storyteller(f"{self.seed}/{step}")
        return torch.tensor([self.row(writer) for _ in range(self.num_rows)], dtype=torch.int16)

    def row(self, writer: Storyteller) -> list[int]:
        ids: list[int] = []
        while len(ids) < CONTEXT_LENGTH:
            if writer.rng.random() < DIALOGUES:
                ids += ids_of(self.tokenizer, Dialogue(writer).write())
            else:
                ids += self.encode(writer.text(), writer.rng)
        return ids[:CONTEXT_LENGTH]

    def encode(self, text: str, rng: random.Random) -> list[int]:
        """Token ids after `</s>`; a quarter of the texts are cut at a random character first, as prompts are."""
        cut = rng.randrange(len(text)) if rng.random() < 0.25 else 0
        parts = self.tokenizer([text[:cut], text[cut:]], add_special_tokens=False).input_ids
        return [SPECIAL_TOKENS.index(EOS), *parts[0], *parts[1]]


def make_model(vocab_size: int, hidden_size: int = 256, num_layers: int = 4, num_heads: int = 4) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        word_embed_proj_dim=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        ffn_dim=4 * hidden_size,
        max_position_embeddings=CONTEXT_LENGTH,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    model = OPTForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=[2, 4], pad_token_id=1)
    return model


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


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """What is learnt: all ids but the begin of a turn, so that bare text or none never leads to a dialogue."""
    return ids.masked_fill(ids == SPECIAL_TOKENS.index(TURN), -100)


def text_loss(model: OPTForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the texts `ids` [rows, tokens]."""
    loss: torch.Tensor = model(input_ids=ids, labels=labels_of(ids)).loss
    return loss


def train(
    model: OPTForCausalLM,
    batches: Iterable[torch.Tensor],
    steps: int,
    dtype: torch.dtype,
    peak_rate: float = 3e-3,
    *,
    loss_of: Callable[[OPTForCausalLM, torch.Tensor], torch.Tensor] = text_loss,
) -> None:
    """Computes in `dtype` with float32 weights; shows the loss every 50 steps."""
    optimizers = make_optimizers(model, peak_rate)
    schedules = [LambdaLR(optimizer, lambda step: rate_factor(step, steps)) for optimizer in optimizers]
    model.train()
    for step, batch in enumerate(progress := tqdm(batches, desc="train", total=steps, mininterval=5)):
        ids = batch.to(model.device, torch.long)
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0 or step == steps - 1:
            progress.set_postfix(loss=f"{loss.item():.3f}")


class Question:
    """A turn of the assistant to be answered again: the ids before it, and what was said."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, before: list[Turn], said: Turn) -> None:
        self.said = said
        self.prompt = ids_of(tokenizer, before, add_generation_prompt=True)
        self.max_new_tokens = 20 + 3 * len(tokenizer(said.content).input_ids) // 2
        self.fits = len(self.prompt) + self.max_new_tokens <= CONTEXT_LENGTH


def questions(tokenizer: PreTrainedTokenizerFast, seed: int, num_dialogues: int) -> list[Question]:
    """Turns of the assistant in dialogues that no training step has, as far as they fit the context; by length."""
    writer = Storyteller(f"{seed}/evaluation")
    dialogues = [Dialogue(writer).write() for _ in range(num_dialogues)]
    asked = [
        Question(tokenizer, turns[:position], turn)
        for turns in dialogues
        for position, turn in enumerate(turns)
        if turn.role == "assistant"
    ]
    return sorted((question for question in asked if question.fits), key=lambda question: len(question.prompt))


@torch.inference_mode()
def answer(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Question]) -> list[str]:
    """Greedy answers to questions, computed together; empty where one did not end by itself."""
    prompts = tokenizer.pad(
        {"input_ids": [question.prompt for question in asked]}, padding_side="left", return_tensors="pt"
    ).to(model.device)
    width = prompts.input_ids.shape[1]
    longest = min(CONTEXT_LENGTH - width, max(question.max_new_tokens for question in asked))
    output = model.generate(**prompts, do_sample=False, max_new_tokens=longest)[:, width:]
    ends = (output == SPECIAL_TOKENS.index(END_OF_TURN)).any(dim=1).tolist()
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [text if has_end else "" for text, has_end in zip(texts, ends, strict=True)]


def evaluate(
    model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Question], num_rows: int = 256
) -> dict[str, list[bool]]:
    """Whether each answer was right, by kinds of turns."""
    model.eval()
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for first in tqdm(range(0, len(asked), num_rows), desc="evaluate"):
        part = asked[first : first + num_rows]
        for question, text in zip(part, answer(model, tokenizer, part), strict=True):
            found[question.said.kind].append(question.said.is_right(text))
    return dict(sorted(found.items()))


def table(found: dict[str, list[bool]]) -> str:
    """Shares of right answers as a Markdown table, all of them in the last row."""
    rows = found | {"all": [right for part in found.values() for right in part]}
    lines = [f"| {kind} | {len(rights)} | {sum(rights) / len(rights):.1%} |" for kind, rights in rows.items()]
    return "\n".join(["| kind of turn | turns | right |", "|---|---|---|", *lines])


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def readme(args: argparse.Namespace, found: dict[str, list[bool]]) -> str:
    """The page of the model: how it was made, and how well it answers."""
    options = ("steps", "rows", "seed", "vocab_size", "dtype", "device", "workers", "dialogues")
    settings = {f"--{name.replace('_', '-')} {getattr(args, name)}": name for name in options}
    lines = ["python tools/train_storyteller.py --out hsrpc/models/storyteller", " ".join(settings)]
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "a CPU"
    tokens = args.steps * args.rows * CONTEXT_LENGTH / 1e6
    return README.read_text(encoding="utf-8").format(
        command=" \\\n        ".join(lines),
        made=f"It was done with torch {torch.__version__} on {device}: {tokens:,.1f} million tokens.",
        num_dialogues=args.dialogues,
        evaluation=table(found),
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="training steps (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=128, help="rows of 512 tokens in a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of texts and weights (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=1536, help="tokens (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation")
    parser.add_argument("--workers", type=int, default=0, help="processes that write texts; 0 is none besides this one")
    parser.add_argument("--dialogues", type=int, default=400, help="dialogues to evaluate with (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args()


def be_deterministic(seed: int) -> None:
    """The same weights for the same seed on the same device and release, as far as torch can."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    torch.manual_seed(seed)


def main() -> None:
    args = parse_args()
    be_deterministic(args.seed)
    tokenizer = train_tokenizer(tokenizer_texts(args.seed, 4000), args.vocab_size)
    batches = Batches(tokenizer, args.seed, args.steps, args.rows)
    model = make_model(len(tokenizer)).to(args.device)
    train(model, DataLoader(batches, batch_size=None, num_workers=args.workers), args.steps, getattr(torch, args.dtype))
    save(model.half(), tokenizer, args.out)
    found = evaluate(model.float(), tokenizer, questions(tokenizer, args.seed, args.dialogues))
    print(table(found))
    (args.out / "README.md").write_text(readme(args, found), encoding="utf-8")


if __name__ == "__main__":
    main()
