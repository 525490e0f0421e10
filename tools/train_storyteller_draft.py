"""Trains, measures and saves the draft model of the bundled model, hsrpc/models/storyteller-draft.

It learns the texts that the bundled model learnt (storyteller.py, storyteller_chat.py), and where asked to, of a part
of them what the bundled model says of every next token. Two busy cores of a CPU took half an hour.

Example:
    python tools/train_storyteller_draft.py --out hsrpc/models/storyteller-draft
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from storyteller import Storyteller
from torch.utils.data import DataLoader
from tqdm import tqdm
from train_storyteller import (
    CONTEXT_LENGTH,
    EOS,
    SPECIAL_TOKENS,
    Batches,
    be_deterministic,
    labels_of,
    make_model,
    questions,
    save,
    text_loss,
    train,
)
from transformers import AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerFast

README = Path(__file__).with_name("storyteller_draft_readme.md")
TEACHER = Path(__file__).parents[1] / "hsrpc" / "models" / "storyteller"
PAD, END_OF_TURN = 1, 4
LENGTHS = (3, 5)
"""Drafted tokens at a time, at most, for which acceptance is measured."""
STORY_TOKENS = 200
"""Tokens that a story is continued by, at most."""


class Outputs(NamedTuple):
    """What the bundled model says to prompts of one kind."""

    prompts: list[list[int]]
    texts: list[list[int]]
    """Tokens behind each."""


class Replay(NamedTuple):
    """Counts of a draft model's tokens beside what was said."""

    tokens: int
    right: int
    """Tokens that are the most probable one by the draft model, given all before them."""
    passes: tuple[int, ...]
    """Passes of the bundled model that all tokens take, for each of the `LENGTHS`."""

    @property
    def taus(self) -> list[float]:
        """Tokens of a pass."""
        return [self.tokens / passes for passes in self.passes]


def embed_as(student: OPTForCausalLM, teacher: OPTForCausalLM) -> None:
    """Begin with the teacher's embeddings, in the directions in which those of the tokens differ most, and as small as
    those of a new model: they are the head too.
    """
    own, given = student.model.decoder, teacher.model.decoder
    width, new = own.embed_tokens.weight.shape[1], own.embed_tokens.weight.std()
    with torch.no_grad():
        directions = torch.linalg.svd(given.embed_tokens.weight, full_matrices=False).Vh[:width].T
        tokens = given.embed_tokens.weight @ directions
        own.embed_tokens.weight.copy_(tokens * new / tokens.std())
        own.embed_positions.weight.copy_(given.embed_positions.weight @ directions * new / tokens.std())


class TaughtLoss:
    """Loss by the text, and on the first rows of a batch by the teacher's distribution in its place."""

    def __init__(self, teacher: OPTForCausalLM, num_rows: int) -> None:
        self.teacher = teacher
        self.num_rows = num_rows

    def __call__(self, model: OPTForCausalLM, ids: torch.Tensor) -> torch.Tensor:
        """Mean of both over the tokens of `ids` [rows, tokens]."""
        taught, read = ids[: self.num_rows], ids[self.num_rows :]
        is_known = labels_of(taught)[:, 1:] >= 0
        with torch.no_grad():
            wanted = self.teacher(input_ids=taught).logits[:, :-1][is_known].float().softmax(dim=-1)
        found = model(input_ids=taught).logits[:, :-1][is_known].float()
        loss = torch.nn.functional.cross_entropy(found, wanted)
        if not len(read):
            return loss
        share = len(taught) / len(ids)
        return share * loss + (1 - share) * text_loss(model, read)


def story_prompts(tokenizer: PreTrainedTokenizerFast, seed: int, num_stories: int) -> list[list[int]]:
    """First words of stories that no training step has, after `</s>`."""
    writer = Storyteller(f"{seed}/evaluation of drafts")
    texts = (" ".join(writer.text().split(" ")[: writer.rng.randint(1, 12)]) for _ in range(num_stories))
    begin = [SPECIAL_TOKENS.index(EOS)]
    return [begin + tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@torch.inference_mode()
def say(
    model: OPTForCausalLM, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float, num_rows: int = 64
) -> Outputs:
    """What the model says to prompts, up to the token that ends it; sampled, or at temperature 0 the most probable."""
    given, texts = sorted(prompts, key=len), list[list[int]]()
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    for first in tqdm(range(0, len(given), num_rows), desc="outputs"):
        part = given[first : first + num_rows]
        width = len(part[-1])
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in part], device=model.device)
        said = model.generate(
            input_ids=ids,
            attention_mask=(ids != PAD).long(),
            max_new_tokens=min(max_new_tokens, CONTEXT_LENGTH - width),
            **how,
        )
        texts += [row[: row.index(PAD)] if PAD in row else row for row in said[:, width:].tolist()]
    return Outputs(given, texts)


@torch.inference_mode()
def replay(model: OPTForCausalLM, outputs: Outputs) -> Replay:
    """How the drafts of `model` would have done: a draft goes on with what was said as long as it is right."""
    tokens, right, passes = 0, 0, [0] * len(LENGTHS)
    for prompt, text in zip(*outputs, strict=True):
        ids = torch.tensor([prompt + text], device=model.device)
        found = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        is_right = [token == wanted for token, wanted in zip(found, text, strict=True)]
        tokens, right = tokens + len(text), right + sum(is_right)
        for i, length in enumerate(LENGTHS):
            passes[i] += num_passes(is_right, length)
    return Replay(tokens, right, tuple(passes))


def num_passes(is_right: Sequence[bool], length: int) -> int:
    """Passes that a text takes when up to `length` tokens are drafted at a time: each gives the accepted and one more.

    `is_right`: whether each of its tokens is drafted where all before it are known.
    """
    position = passes = 0
    while position < len(is_right):
        drafted = is_right[position : position + length]
        position += (drafted.index(False) if False in drafted else len(drafted)) + 1
        passes += 1
    return passes


def measure(
    model: OPTForCausalLM, teacher: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> dict[str, Replay]:
    """Acceptance by what is asked for and how it is sampled."""
    asked = [each.prompt for each in questions(tokenizer, args.seed, args.dialogues)]
    stories = story_prompts(tokenizer, args.seed, args.stories)
    found = {}
    for how, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
        torch.manual_seed(args.seed)
        found[f"answers, {how}"] = replay(model, say(teacher, asked, STORY_TOKENS, temperature))
        found[f"stories, {how}"] = replay(model, say(teacher, stories, STORY_TOKENS, temperature))
    return found


def table(found: dict[str, Replay]) -> str:
    """Acceptance as a Markdown table."""
    lines = [
        f"| {what} | {each.tokens} | {each.right / each.tokens:.1%} | {' | '.join(f'{tau:.2f}' for tau in each.taus)} |"
        for what, each in found.items()
    ]
    heads = " | ".join(f"tau, {length} drafted" for length in LENGTHS)
    return "\n".join([f"| what | tokens | right | {heads} |", "|---|---|---|" + "---|" * len(LENGTHS), *lines])


def readme(args: argparse.Namespace, model: OPTForCausalLM, found: dict[str, Replay]) -> str:
    """The page of the model: how it was made, and how much of what it drafts is accepted."""
    options = ("steps", "rows", "taught", "rate", "seed", "dtype", "device", "dialogues", "stories")
    settings = [f"--{name} {getattr(args, name)}" for name in options]
    lines = ["python tools/train_storyteller_draft.py --out hsrpc/models/storyteller-draft", " ".join(settings)]
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "a CPU"
    tokens = args.steps * args.rows * CONTEXT_LENGTH / 1e6
    size, config = model.num_parameters(), model.config
    return README.read_text(encoding="utf-8").format(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        head=config.hidden_size // config.num_attention_heads,
        ffn=config.ffn_dim,
        parameters=f"{size:,}",
        megabytes=f"{2 * size / 1e6:.1f}",
        command=" \\\n        ".join(lines),
        made=f"It was done with torch {torch.__version__} on {device}: {tokens:,.1f} million tokens.",
        evaluation=table(found),
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="training steps (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="rows of 512 tokens in a step (default: %(default)s)")
    parser.add_argument("--taught", type=int, default=0, help="rows that the teacher tells (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.012, help="peak rate of learning (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2, help="seed of texts and weights (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the computation")
    parser.add_argument("--dialogues", type=int, default=20, help="dialogues to measure with (default: %(default)s)")
    parser.add_argument("--stories", type=int, default=32, help="stories to measure with (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    be_deterministic(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    teacher = OPTForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).to(args.device).eval()
    model = make_model(len(tokenizer), hidden_size=96, num_layers=2, num_heads=3).to(args.device)
    embed_as(model, teacher)
    batches = DataLoader(Batches(tokenizer, args.seed, args.steps, args.rows), batch_size=None)
    loss = TaughtLoss(teacher, args.taught) if args.taught else text_loss
    train(model, batches, args.steps, getattr(torch, args.dtype), args.rate, loss_of=loss)
    save(model.half(), tokenizer, args.out)
    shutil.copy(TEACHER / "tokenizer_config.json", args.out)  # without what reading it has added
    found = measure(model.float().eval(), teacher, tokenizer, args)
    print(table(found))
    (args.out / "README.md").write_text(readme(args, model, found), encoding="utf-8")


if __name__ == "__main__":
    main()
