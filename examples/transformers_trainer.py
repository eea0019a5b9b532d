"""Prune a tiny GPT-2 and fine-tune it in Hugging Face's Trainer, with the mask in checkpoints.

Trains on characters of Alice's Adventures in Wonderland (``alice.txt``): nothing is downloaded.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import lossprune
from lossprune.trainers.transformers import MaskCallback

CONTEXT, HELD_OUT = 64, "CHAPTER XI\n"  # the last two chapters are not trained on


def characters() -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]], int]:
    """Return examples of 64 characters to train on, those held out, and how many characters."""
    text = (Path(__file__).parent / "alice.txt").read_text()
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    training, held_out = text.split(HELD_OUT)

    def examples(part: str) -> list[dict[str, torch.Tensor]]:
        ids = torch.tensor([alphabet[character] for character in part])
        rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        return [{"input_ids": row, "labels": row} for row in rows]

    return examples(training), examples(held_out), len(alphabet)


def tiny_gpt2(vocabulary: int, width: int = 32, layers: int = 2) -> GPT2LMHeadModel:
    """Return a small GPT-2 with new weights."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    return GPT2LMHeadModel(config)


def arguments(folder: str, steps: int, **more: Any) -> TrainingArguments:
    """Return arguments of a quiet training on the CPU."""
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **more,
    )


def main() -> None:
    """Train, prune, fine-tune; then go on from the checkpoint in new objects."""
    torch.manual_seed(0)
    training, held_out, vocabulary = characters()
    model = tiny_gpt2(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        dense = Trainer(model, arguments(folder, 60, save_strategy="no"), train_dataset=training)
        dense.train()
        batches = torch.utils.data.DataLoader(training, batch_size=16)
        result = lossprune.prune(
            model,
            "QM",
            sparsity=0.5,
            data=batches,
            examples=64,
            stages=3,
            loss="next_token",
            estimator="monte-carlo",
        )
        tuning = Trainer(
            model,
            arguments(folder, 20, save_steps=20),
            train_dataset=training,
            callbacks=[MaskCallback(result.mask)],
        )
        tuning.train()

        held = MaskCallback()  # gets its mask from the checkpoint
        resumed = Trainer(
            tiny_gpt2(vocabulary),
            arguments(folder, 40, save_strategy="no"),
            train_dataset=training,
            eval_dataset=held_out,
            callbacks=[held],
        )
        resumed.train(resume_from_checkpoint=True)
        print(f"held-out loss {resumed.evaluate()['eval_loss']:.3f}")
    weights: dict[str, nn.Parameter] = dict(resumed.model.named_parameters())
    zeros = sum(int((weights[name] == 0).sum()) for name in held.mask)
    print(f"{zeros} weights are exactly 0, {held.mask.removed} were removed")


if __name__ == "__main__":
    main()
