"""Lightning's and Hugging Face's trainers: zeros after every step, and checkpoints that go on."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lossprune
from lossprune.pruning import PruningError
from lossprune.trainers import GradualPruning

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers' own


def load_example(root: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def zeros(model, mask) -> bool:
    weights = dict(model.named_parameters())
    return all(not weights[n][~k].any() and weights[n][k].all() for n, k in mask.items())


def left_of(model, names) -> int:
    weights = dict(model.named_parameters())
    return sum(int(weights[name].count_nonzero()) for name in names)


def same_weights(first, second) -> bool:
    return all(
        torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items()
    )


class TestGradualPruning:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"steps": []}, r"steps must be rising whole numbers from 0, got \(\)"),
            ({"steps": [5, 5]}, r"steps must be rising whole numbers from 0, got \(5, 5\)"),
            ({"steps": [-1]}, "steps must be rising"),
            ({"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\), got 1.0"),
            ({"schedule": "cubc"}, "unknown schedule 'cubc' .did you mean 'cubic'"),
            ({"lossfunction": "mse"}, "takes no 'lossfunction'"),
            ({"compensate": True}, "takes no 'compensate'.*; it takes examples, reg"),
            ({"reg": "auto"}, 'reg must be a number ≥ 0 in a pruning while training, got "auto"'),
        ],
    )
    def test_what_does_not_do_is_told_at_once(self, changed, message):
        with pytest.raises(ValueError, match=message):
            GradualPruning("LM", **{"sparsity": 0.5, "steps": [1, 2], **changed})


class TestLightning:
    @pytest.fixture(scope="class")
    def example(self, root):
        return load_example(root, "lightning_trainer")

    @pytest.fixture(scope="class")
    def loader(self):
        digits = lossprune.data.load("digits", seed=1111)
        rows = TensorDataset(digits.inputs(digits.train.images)[:400], digits.train.labels[:400])
        return DataLoader(rows, batch_size=50)  # in order, so that runs can be compared

    def fit(
        self, example, loader, folder, of, epochs, *, start=None, module=None, before=(), **more
    ):
        """Return the module, its trainer and callback, and what was seen after each step."""
        seen = []

        class Watch(example.pl.Callback):
            def on_train_batch_end(self, trainer, module, *_):
                seen.append(holder.mask is not None and zeros(module, holder.mask))

        holder = of if isinstance(of, example.MaskCallback) else example.MaskCallback(of)
        torch.manual_seed(0)
        module = module or example.Digits()
        trainer = example.pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            callbacks=[*before, holder, Watch()],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **more,
        )
        trainer.fit(module, loader, ckpt_path=start, weights_only=True if start else None)
        return module, trainer, holder, seen

    def mask(self, example, sparsity=0.8):
        torch.manual_seed(0)
        return lossprune.prune(example.Digits(), "MP", sparsity=sparsity).mask

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
        other = self.mask(example, 0.5)
        with pytest.raises(PruningError, match=r"but the checkpoint has Mask.*, another one"):
            self.fit(example, loader, tmp_path, other, 4, start=tmp_path / "last.ckpt")

    def test_a_second_fit_is_free(self, example, loader, tmp_path):
        mask = self.mask(example)
        module, trainer, *_ = self.fit(example, loader, tmp_path, mask, 1)
        module.training_step(next(iter(loader))).backward()
        trainer.optimizers[0].step()
        assert not zeros(module, mask)

    def test_a_mask_that_is_lacking(self, example, loader, tmp_path):
        with pytest.raises(PruningError, match=r"no mask: give MaskCallback\(mask\), or go on"):
            self.fit(example, loader, tmp_path, None, 1)
        with pytest.raises(ValueError, match=r"takes a lossprune.Mask, .* got dict"):
            example.MaskCallback({})
        later = GradualPruning("MP", sparsity=0.5, steps=[99])
        _, dense, *_ = self.fit(example, loader, tmp_path, later, 1)  # its time has not come
        dense.save_checkpoint(tmp_path / "dense.ckpt")
        mask = self.mask(example)
        with pytest.warns(UserWarning, match=r"dense.ckpt has no mask of this callback: pruning"):
            *_, seen = self.fit(example, loader, tmp_path, mask, 2, start=tmp_path / "dense.ckpt")
        assert seen == [True] * 8

    def test_two_optimizers_of_which_one_holds_masked_weights(self, example, loader, tmp_path):
        class Two(example.Digits):
            automatic_optimization = False

            def training_step(self, batch):
                loss = super().training_step(batch)
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()

            def configure_optimizers(self):
                parts = self.network[1].parameters(), self.network[3].parameters()
                return [torch.optim.AdamW(part) for part in parts]

        mask = lossprune.prune(Two(), "MP", sparsity=0.5, parameters="network.1.weight").mask
        *_, seen = self.fit(example, loader, tmp_path, mask, 1, module=Two())
        assert seen == [True] * 8

    @pytest.mark.parametrize("data", ["given", "the trainer's"])
    def test_pruned_on_the_way_and_stopped_between_stages(self, example, loader, tmp_path, data):
        """After 4, 12 and 20 of 24 steps; stopped after 16, and in another process's objects on."""
        batches = list(loader) if data == "given" else None
        plan = GradualPruning(
            "QM", sparsity=0.8, steps=(4, 12, 20), schedule="cubic", data=batches, examples=100
        )
        through, _, holder, seen = self.fit(example, loader, tmp_path, plan, 3)
        assert seen == [False] * 3 + [True] * 21
        total = 64 * 64 + 640
        expected = [round(kappa * total) for kappa in (0.8 * 19 / 27, 0.8 * 26 / 27, 0.8)]
        assert [record.removed for record in holder.records] == expected
        assert left_of(through, holder.mask) == total - expected[-1]

        _, first, before, _ = self.fit(example, loader, tmp_path, plan, 2)
        first.save_checkpoint(tmp_path / "last.ckpt")
        resumed, _, after, _ = self.fit(
            example, loader, tmp_path, plan, 3, start=tmp_path / "last.ckpt"
        )
        assert [record.stage for record in before.records] == [1, 2]
        assert [record.stage for record in after.records] == [3]
        assert after.mask == holder.mask
        assert same_weights(resumed, through)

    def test_a_stage_is_that_of_prune(self, example, loader, tmp_path):
        """Before the first step, on weights that are known."""
        settings = {"sparsity": 0.6, "data": list(loader), "seed": 0}
        torch.manual_seed(0)
        expected = lossprune.prune(example.Digits(), "LM", stages=1, average=0.0, **settings)
        plan = GradualPruning("LM", steps=[0], **settings)
        *_, holder, seen = self.fit(example, loader, tmp_path, plan, 1)
        assert holder.mask == expected.mask
        assert seen == [True] * 8

        again, *_ = self.fit(example, loader, tmp_path, holder, 1)  # from the start
        assert len(holder.records) == 1
        assert zeros(again, holder.mask)

    def test_an_average_that_began_with_dense_weights(self, example, loader, tmp_path):
        """Lightning copies the weights for it before training starts, and back at the end."""
        for of in (self.mask(example), GradualPruning("MP", sparsity=0.8, steps=[3, 10])):
            average = example.pl.callbacks.EMAWeightAveraging(decay=0.9)
            module, trainer, holder, seen = self.fit(
                example, loader, tmp_path, of, 2, before=[average]
            )
            assert seen[-1]
            assert zeros(module, holder.mask)
            trainer.save_checkpoint(tmp_path / "average.ckpt")
            saved = torch.load(tmp_path / "average.ckpt", weights_only=True)["state_dict"]
            assert not any(saved[name][~kept].any() for name, kept in holder.mask.items())

    def test_a_loader_that_cannot_be_drawn_from(self, example, loader, tmp_path):
        plan = GradualPruning("LM", sparsity=0.5, steps=[0])
        with pytest.raises(PruningError, match=r"a list, has no data set: give GradualPruning"):
            self.fit(example, list(loader), tmp_path, plan, 1)


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

    def train(self, example, text, folder, of, steps, *, start=None, **more):
        """Return the model, its callback, and what was seen after each step."""
        from transformers import TrainerCallback

        seen = []
        holder = example.MaskCallback(of)

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **_):
                seen.append(holder.mask is not None and zeros(model, holder.mask))

        model = self.model(example, text)
        trainer = example.Trainer(
            model,
            example.arguments(str(folder), steps, seed=1, lr_scheduler_type="constant", **more),
            train_dataset=text[0][:256],
            eval_dataset=text[1][:32],
            callbacks=[holder, Watch()],
        )
        trainer.train(resume_from_checkpoint=start)
        return model, holder, seen

    def mask(self, example, text, sparsity=0.8):
        return lossprune.prune(self.model(example, text), "MP", sparsity=sparsity).mask

    @pytest.mark.parametrize(
        "more",
        [
            {"optim": "adamw_torch"},
            {"optim": "adamw_torch_fused", "gradient_accumulation_steps": 2},
            {"optim": "sgd", "bf16": True, "max_grad_norm": 0.5},
            {"optim": "schedule_free_adamw", "gradient_checkpointing": True},
        ],
        ids=[
            "AdamW",
            "fused, accumulated",
            "SGD, bfloat16, clipped",
            "schedule-free",
        ],
    )
    def test_zeros_after_every_step(self, example, text, tmp_path, more):
        mask = self.mask(example, text)
        model, _, seen = self.train(example, text, tmp_path, mask, 6, save_strategy="no", **more)
        assert seen == [True] * 6
        assert zeros(model, mask)

    def test_a_checkpoint_carries_the_mask_and_goes_on_as_if_never_stopped(
        self, example, text, tmp_path
    ):
        mask = self.mask(example, text)
        through, *_ = self.train(example, text, tmp_path / "a", mask, 6, save_steps=3)
        checkpoint = tmp_path / "a" / "checkpoint-3"
        assert lossprune.Mask.load(checkpoint / "mask.safetensors") == mask

        def go_on(of, start, **more):
            more.setdefault("save_strategy", "no")
            return self.train(example, text, start.parent, of, 6, start=str(start), **more)

        resumed, holder, seen = go_on(None, checkpoint)
        assert holder.mask == mask
        assert seen == [True] * 3
        assert same_weights(resumed, through)

        with pytest.raises(PruningError, match=r"given Mask.*, but .*mask.safetensors has Mask"):
            go_on(self.mask(example, text, 0.5), checkpoint)
        lacking = Path(shutil.copytree(checkpoint, tmp_path / "b" / "checkpoint-3"))
        (lacking / "mask.safetensors").unlink()
        with pytest.raises(PruningError, match=r"no mask, and there is no .*b/checkpoint-3/mask"):
            go_on(None, lacking)
        with pytest.warns(UserWarning, match="the checkpoint of step 3 has no mask beside it"):
            resumed, *_ = go_on(mask, lacking)
        assert same_weights(resumed, through)
        elsewhere, holder, _ = go_on(None, lacking, resume_from_checkpoint=str(checkpoint))
        assert holder.mask == mask
        assert same_weights(elsewhere, through)
        self.mask(example, text, 0.9).save(lacking / "mask.safetensors")
        with pytest.raises(PruningError, match="is not the mask of the weights that the training"):
            go_on(None, lacking)

    def test_pruned_on_the_way_and_stopped_between_stages(self, example, text, tmp_path):
        """After 2, 4 and 7 of 8 steps, on the trainer's own data; stopped after 5."""
        plan = GradualPruning(
            "LM", sparsity=0.8, steps=(2, 4, 7), schedule="cubic", examples=32, loss="next_token"
        )
        through, holder, seen = self.train(example, text, tmp_path, plan, 8, save_steps=5)
        assert seen == [False] + [True] * 7
        total = 16 * (48 + 16 + 64 + 64) + 72 * 16
        expected = [round(kappa * total) for kappa in (0.8 * 19 / 27, 0.8 * 26 / 27, 0.8)]
        assert [record.removed for record in holder.records] == expected
        assert left_of(through, holder.mask) == total - expected[-1]

        start = str(tmp_path / "checkpoint-5")
        resumed, after, _ = self.train(
            example, text, tmp_path, plan, 8, start=start, save_strategy="no"
        )
        assert [record.stage for record in after.records] == [3]
        assert after.mask == holder.mask
        assert same_weights(resumed, through)

        # Killed after the weights were written and before the mask was: zeros go first.
        (tmp_path / "checkpoint-5" / "mask.safetensors").unlink()
        with pytest.warns(UserWarning, match="the checkpoint of step 5 has no mask beside it"):
            resumed, after, _ = self.train(
                example, text, tmp_path, plan, 8, start=start, save_strategy="no"
            )
        assert [record.stage for record in after.records] == [1, 2, 3]
        assert after.mask == holder.mask
        assert same_weights(resumed, through)

    def test_the_best_checkpoint_s_mask_is_that_of_its_weights(self, example, text, tmp_path):
        plan = GradualPruning("MP", sparsity=0.9, steps=(1, 3))
        model, holder, _ = self.train(
            example,
            text,
            tmp_path,
            plan,
            4,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            greater_is_better=True,  # of the loss: the first
            save_total_limit=1,
        )
        assert not (tmp_path / "checkpoint-4").exists()
        assert holder.mask == lossprune.Mask.load(tmp_path / "checkpoint-2" / "mask.safetensors")
        assert zeros(model, holder.mask)
        assert [record.stage for record in holder.records] == [1, 2]

    def test_adapters_on_masked_weights_and_their_merge(self, example, text, tmp_path):
        peft = pytest.importorskip("peft")
        mask = self.mask(example, text)

        def train(of, steps, start=None, **more):
            holder = example.MaskCallback(of)
            base = self.model(example, text)  # dense: the callback applies the mask
            config = peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, r=2)
            trainer = example.Trainer(
                peft.get_peft_model(base, config),
                example.arguments(str(tmp_path), steps, lr_scheduler_type="constant", **more),
                train_dataset=text[0][:256],
                callbacks=[holder],
            )
            with pytest.warns(UserWarning, match="2 masked layers have adapters, and merging"):
                trainer.train(resume_from_checkpoint=start)
            return trainer.model, holder.mask

        through, _ = train(mask, 4, save_steps=2)
        resumed, found = train(None, 4, str(tmp_path / "checkpoint-2"), save_strategy="no")
        assert found == mask
        assert same_weights(resumed, through)
        merged = resumed.merge_and_unload()
        assert not zeros(merged, mask)
        assert zeros(mask.apply_(merged), mask)

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
