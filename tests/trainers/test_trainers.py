"""Lightning's and Hugging Face's trainers: zeros after every step, and checkpoints that go on."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lossprune

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers' own


def load_example(root: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def zeros(model, mask) -> bool:
    weights = dict(model.named_parameters())
    return all(not weights[n][~k].any() and weights[n][k].all() for n, k in mask.items())


def same_weights(first, second) -> bool:
    return all(
        torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items()
    )


class TestLightning:
    @pytest.fixture(scope="class")
    def example(self, root):
        return load_example(root, "lightning_trainer")

    @pytest.fixture(scope="class")
    def loader(self):
        digits = lossprune.data.load("digits", seed=1111)
        rows = TensorDataset(digits.inputs(digits.train.images)[:400], digits.train.labels[:400])
        return DataLoader(rows, batch_size=50)  # in order, so that runs can be compared

    def fit(self, example, loader, tmp_path, mask, epochs, *, start=None, **more):
        """Return the module, how many steps ended in zeros and how many were made."""
        seen = []

        class Watch(example.pl.Callback):
            def on_train_batch_end(self, trainer, module, *_):
                seen.append(zeros(module, holder.mask))

        holder = example.EnforceMask(mask)
        torch.manual_seed(0)
        module = example.Digits()
        trainer = example.pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            callbacks=[holder, Watch()],
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **more,
        )
        trainer.fit(module, loader, ckpt_path=start, weights_only=True if start else None)
        return module, trainer, holder, seen

    def mask(self, example):
        torch.manual_seed(0)
        return lossprune.prune(example.Digits(), "MP", sparsity=0.8).mask

    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
            {"precision": "bf16-mixed"},
            {"precision": "64-true"},
        ],
        ids=["plain", "accumulated and clipped", "bfloat16", "float64"],
    )
    def test_zeros_after_every_step(self, example, loader, tmp_path, more):
        *_, seen = self.fit(example, loader, tmp_path, self.mask(example), 2, **more)
        assert seen == [True] * 16

    def test_a_checkpoint_carries_the_mask_and_goes_on_as_if_never_stopped(
        self, example, loader, tmp_path
    ):
        mask = self.mask(example)
        _, first, *_ = self.fit(example, loader, tmp_path, mask, 2)
        first.save_checkpoint(tmp_path / "last.ckpt")
        through, *_ = self.fit(example, loader, tmp_path, mask, 4)

        resumed, trainer, holder, seen = self.fit(
            example, loader, tmp_path, None, 4, start=tmp_path / "last.ckpt"
        )

        assert trainer.global_step == 32
        assert seen == [True] * 16  # the second half
        assert holder.mask == mask
        assert holder.mask.criterion == "MP"
        assert same_weights(resumed, through)

    def test_a_second_fit_is_free(self, example, loader, tmp_path):
        mask = self.mask(example)
        module, trainer, *_ = self.fit(example, loader, tmp_path, mask, 1)
        module.training_step(next(iter(loader))).backward()
        trainer.optimizers[0].step()
        assert not zeros(module, mask)


class TestTransformers:
    @pytest.fixture(scope="class")
    def example(self, root):
        return load_example(root, "transformers_trainer")

    @pytest.fixture(scope="class")
    def text(self, example):
        return example.characters()

    def model(self, example, text):
        torch.manual_seed(0)
        return example.tiny_gpt2(text[2], width=16, layers=1)

    def train(self, example, text, folder, mask, steps, *, start=None, **more):
        seen = []

        class Watch(example.TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **_):
                seen.append(zeros(model, mask))

        model = self.model(example, text)
        trainer = example.Trainer(
            model,
            example.arguments(str(folder), steps, seed=1, lr_scheduler_type="constant", **more),
            train_dataset=text[0][:256],
            callbacks=[example.EnforceMask(mask), Watch()],
        )
        trainer.train(resume_from_checkpoint=start)
        return model, seen

    def mask(self, example, text):
        return lossprune.prune(self.model(example, text), "MP", sparsity=0.8).mask

    @pytest.mark.parametrize(
        "more",
        [
            {"optim": "adamw_torch"},
            {"optim": "adamw_torch_fused", "gradient_accumulation_steps": 2},
            {"optim": "sgd", "bf16": True, "max_grad_norm": 0.5},
        ],
        ids=["AdamW", "fused, accumulated", "SGD, bfloat16, clipped"],
    )
    def test_zeros_after_every_step(self, example, text, tmp_path, more):
        mask = self.mask(example, text)
        _, seen = self.train(example, text, tmp_path, mask, 6, save_strategy="no", **more)
        assert seen == [True] * 6

    def test_a_checkpoint_carries_the_mask_and_goes_on_as_if_never_stopped(
        self, example, text, tmp_path
    ):
        mask = self.mask(example, text)
        through, _ = self.train(example, text, tmp_path, mask, 6, save_steps=3)

        checkpoint = tmp_path / "checkpoint-3"
        loaded = lossprune.Mask.load(checkpoint / "mask.safetensors")
        resumed, seen = self.train(
            example, text, tmp_path, loaded, 6, start=str(checkpoint), save_steps=3
        )

        assert loaded == mask
        assert seen == [True] * 3
        assert same_weights(resumed, through)

    def test_gpt2_s_own_weights_are_what_is_pruned(self, example, text):
        """Its layers are Conv1D, with (inputs, outputs); embeddings and norms stay."""
        mask = self.mask(example, text)
        assert list(mask) == [
            "transformer.h.0.attn.c_attn.weight",
            "transformer.h.0.attn.c_proj.weight",
            "transformer.h.0.mlp.c_fc.weight",
            "transformer.h.0.mlp.c_proj.weight",
            "lm_head.weight",
        ]
        assert mask.total == 16 * (48 + 16 + 64 + 64) + 72 * 16
