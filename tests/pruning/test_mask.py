"""Masks: a mapping, held through anyone's optimizer, kept in a file."""

import contextlib
import copy
import json
import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import lossprune
from lossprune.pruning import PruningError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 4))


def random_mask(model: nn.Module, keep: float = 0.5, seed: int = 0) -> lossprune.Mask:
    generator = torch.Generator().manual_seed(seed)
    return lossprune.Mask(
        {
            name: torch.rand(kept.shape, generator=generator) < keep
            for name, kept in lossprune.Mask.dense(model).items()
        },
        criterion="QM",
    )


class TestMapping:
    def test_is_a_mapping_of_bool_tensors(self):
        mask = lossprune.Mask.dense(network())
        assert list(mask) == ["0.weight", "3.weight"]
        assert len(mask) == 2
        assert "0.weight" in mask
        assert "0.bias" not in mask
        assert mask["3.weight"].shape == (4, 9)
        assert {kept.dtype for kept in mask.values()} == {torch.bool}
        with pytest.raises(KeyError):
            mask["1.weight"]

    def test_dense_keeps_everything(self):
        mask = lossprune.Mask.dense(network())
        assert (mask.sparsity, mask.removed, mask.total) == (0.0, 0, 54)

    def test_sparsity_is_exact(self):
        kept = torch.ones(7, 3, dtype=torch.bool)
        kept.view(-1)[:5] = False
        mask = lossprune.Mask({"a": kept, "b": torch.zeros(2, dtype=torch.bool)})
        assert (mask.removed, mask.total) == (7, 23)
        assert mask.sparsity == 7 / 23

    def test_layer_by_layer(self):
        kept = torch.ones(7, 3, dtype=torch.bool)
        kept.view(-1)[:5] = False
        empty = torch.zeros(0, 4, dtype=torch.bool)
        mask = lossprune.Mask({"b": kept, "a": torch.zeros(2, dtype=torch.bool), "c": empty})
        assert [
            (layer.name, layer.shape, layer.total, layer.kept, layer.removed, layer.sparsity)
            for layer in mask.layers()
        ] == [
            ("b", (7, 3), 21, 16, 5, 5 / 21),
            ("a", (2,), 2, 0, 2, 1.0),
            ("c", (0, 4), 0, 0, 0, 0.0),
        ]

    def test_empty(self):
        assert lossprune.Mask({}).sparsity == 0.0
        assert lossprune.Mask({}).layers() == ()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
    def test_takes_only_bool(self, dtype):
        with pytest.raises(ValueError, match=rf"'a' must be a bool tensor, got {dtype}"):
            lossprune.Mask({"a": torch.ones(3, dtype=dtype)})

    def test_equality_is_of_names_and_entries(self):
        mask = random_mask(network())
        same = lossprune.Mask({name: kept.clone() for name, kept in mask.items()})
        other = {name: kept.clone() for name, kept in mask.items()}
        other["3.weight"][0, 0] ^= True
        assert mask == same
        assert mask != lossprune.Mask(other)
        assert mask != lossprune.Mask({"0.weight": mask["0.weight"]})
        assert mask != lossprune.Mask({n: kept.flatten() for n, kept in mask.items()})
        assert mask != "a string"

    def test_has_no_hash(self):
        with pytest.raises(TypeError, match="unhashable"):
            hash(lossprune.Mask({}))

    def test_to_another_device(self):
        mask = random_mask(network())
        assert mask.to("cpu") == mask
        assert mask.to("cpu").criterion == "QM"

    def test_says_what_it_is(self):
        assert repr(random_mask(network())).startswith("Mask(")


class TestApply:
    def test_removed_weights_become_exactly_zero_and_no_others_change(self):
        model = network()
        before = copy.deepcopy(model.state_dict())
        mask = random_mask(model)

        assert mask.apply_(model) is model

        for name, value in model.state_dict().items():
            expected = before[name] * mask[name] if name in mask else before[name]
            assert torch.equal(value, expected)
        assert not torch.signbit(model[3].weight[~mask["3.weight"]]).any()

    def test_weights_that_are_not_finite_become_zero_too(self):
        model = nn.Linear(2, 1)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[torch.nan, torch.inf]]))
        lossprune.Mask({"weight": torch.zeros(1, 2, dtype=torch.bool)}).apply_(model)
        assert model.weight.tolist() == [[0.0, 0.0]]

    def test_in_place_and_outside_the_graph(self):
        model = network()
        storage = model[3].weight.data_ptr()
        random_mask(model).apply_(model)
        assert model[3].weight.data_ptr() == storage
        assert model[3].weight.is_leaf
        assert model[3].weight.requires_grad

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ({"0.weight": (3, 2, 3), "9.weight": (1,)}, "'9.weight', which Sequential lacks"),
            ({"3.weight": (4, 8)}, r"'3\.weight' has shape \(4, 8\), the parameter \(4, 9\)"),
            ({"1.running_mean": (3,)}, r"'1\.running_mean', which"),
        ],
    )
    def test_mask_of_another_network_is_refused_and_changes_nothing(self, shapes, message):
        model = network()
        before = copy.deepcopy(model.state_dict())
        mask = lossprune.Mask({n: torch.zeros(s, dtype=torch.bool) for n, s in shapes.items()})
        for call in (
            lambda: mask.apply_(model),
            lambda: mask.enforce(model, torch.optim.SGD(model.parameters(), lr=0.1)),
        ):
            with pytest.raises(PruningError, match=message):
                call()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])

    def test_every_mismatch_is_listed(self):
        model = network()
        shapes = {"0.weihgt": (3, 2, 3), "3.weight": (4, 8), "0.bias": (3,), "conv.weight": (1,)}
        mask = lossprune.Mask({n: torch.zeros(s, dtype=torch.bool) for n, s in shapes.items()})
        faults = (
            "it names '0.weihgt', which Sequential lacks (did you mean '0.weight'?)",
            "its '3.weight' has shape (4, 8), the parameter (4, 9)",
            "it names 'conv.weight', which Sequential lacks",
        )
        assert mask.mismatches(model) == faults
        with pytest.raises(PruningError) as error:
            mask.apply_(model)
        assert str(error.value) == f"the mask does not fit Sequential: {'; '.join(faults)}"
        assert random_mask(model).mismatches(model) == ()

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda model: torch.compile(model, backend="eager"),
            nn.DataParallel,
            lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
            lambda model: nn.Sequential(*model[:3], torch.compile(model[3], backend="eager")),
        ],
        ids=["compile", "DataParallel", "both", "compiled layer"],
    )
    def test_wrapped_networks_take_and_give_masks_of_plain_ones(self, wrap):
        plain, wrapped = network(), wrap(network())
        mask = random_mask(plain)
        assert mask.mismatches(wrapped) == ()
        mask.apply_(wrapped)
        expected = dict(mask.apply_(network()).named_parameters())
        for parameter, value in zip(wrapped.parameters(), expected.values(), strict=True):
            assert torch.equal(parameter, value)
        other = random_mask(wrapped, seed=1)
        assert set(other) != set(mask)
        other.apply_(plain)
        assert (plain[3].weight == 0).sum() == other.layers()[1].removed

    def test_distributed_data_parallel(self):
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        try:
            mask = random_mask(network())
            wrapped = nn.parallel.DistributedDataParallel(network())
            mask.enforce(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))
            assert zeros(wrapped.module, mask)
            again = lossprune.prune(wrapped, "MP", sparsity=0.5).mask
            assert list(again) == ["module.0.weight", "module.3.weight"]
            assert again.mismatches(network()) == ()
        finally:
            torch.distributed.destroy_process_group()

    def test_names_that_two_parameters_could_mean_are_not_guessed(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(2, 2)
                self.module = nn.ModuleDict({"fc": nn.Linear(2, 2)})

        model = Both()
        ones = torch.ones(2, 2, dtype=torch.bool)
        assert lossprune.Mask({"fc.weight": ~ones}).mismatches(model) == ()
        lossprune.Mask({"fc.weight": ~ones}).apply_(model)
        assert (model.module["fc"].weight != 0).any()
        assert len(lossprune.Mask({"module.module.fc.weight": ones}).mismatches(model)) == 1

    def test_weight_that_layers_share(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        model[2].weight = model[0].weight
        mask = lossprune.prune(model, "MP", sparsity=0.5).mask
        assert list(mask) == ["0.weight"]
        mask.apply_(model)
        assert int((model[2].weight == 0).sum()) == 2


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum, decay": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    ),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True, amsgrad=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def step(model, optimizer, *, poison: bool = False) -> None:
    optimizer.zero_grad()
    logits = model(torch.randn(6, 2, 5))
    nn.functional.cross_entropy(logits, torch.arange(6) % 4).backward()
    if poison:
        model[3].weight.grad.fill_(torch.nan)
    optimizer.step()


def zeros(model, mask) -> bool:
    weights = dict(model.named_parameters())
    return all(
        torch.equal(weights[name][~kept], torch.zeros(int((~kept).sum())))
        for name, kept in mask.items()
    )


class TestEnforce:
    @pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
    def test_removed_weights_stay_exactly_zero(self, build):
        model = network()
        mask = random_mask(model)
        optimizer = build(model.parameters())
        step(model, optimizer)  # momentum from before the mask pushes removed weights
        mask.enforce(model, optimizer)
        assert zeros(model, mask)
        before = model[3].weight.detach().clone()
        for _ in range(5):
            step(model, optimizer)
            assert zeros(model, mask)
        moved = (model[3].weight != before) & mask["3.weight"]
        assert moved.sum() == mask["3.weight"].sum()  # and the others train

    @pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
    def test_kept_weights_move_as_without_a_mask_at_the_first_step(self, build):
        models = [network() for _ in range(2)]
        mask = random_mask(models[0])
        for model, enforced in zip(models, (True, False), strict=True):
            mask.apply_(model)
            optimizer = build(model.parameters())
            if enforced:
                mask.enforce(model, optimizer)
            torch.manual_seed(1)
            step(model, optimizer)
        for (name, held), free in zip(
            models[0].named_parameters(), models[1].parameters(), strict=True
        ):
            kept = mask.get(name, torch.ones_like(held, dtype=torch.bool))
            assert torch.equal(held[kept], free[kept])

    @pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
    def test_also_where_a_gradient_is_not_a_number(self, build):
        model = network()
        mask = random_mask(model)
        optimizer = build(model.parameters())
        mask.enforce(model, optimizer)
        step(model, optimizer, poison=True)
        assert model[3].weight[mask["3.weight"]].isnan().all()
        assert zeros(model, lossprune.Mask({"3.weight": mask["3.weight"]}))

    def test_through_a_closure(self):
        model = network()
        mask = random_mask(model)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
        mask.enforce(model, optimizer)
        inputs, targets = torch.randn(6, 2, 5), torch.arange(6) % 4

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert zeros(model, mask)

    def test_until_it_is_removed(self):
        model = network()
        mask = random_mask(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = mask.enforce(model, optimizer)
        step(model, optimizer)
        handle.remove()
        assert zeros(model, mask)
        step(model, optimizer)
        assert not zeros(model, mask)
        handle.remove()  # again does no harm

    def test_as_a_context_manager_also_after_an_exception(self):
        model = network()
        mask = random_mask(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with contextlib.suppress(ZeroDivisionError), mask.enforce(model, optimizer):
            step(model, optimizer)
            assert zeros(model, mask)
            raise ZeroDivisionError
        step(model, optimizer)
        assert not zeros(model, mask)

    def test_two_masks_hold_together_and_leave_apart(self):
        model = network()
        first, second = random_mask(model, seed=1), random_mask(model, seed=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = first.enforce(model, optimizer)
        second.enforce(model, optimizer)
        step(model, optimizer)
        assert zeros(model, first)
        assert zeros(model, second)
        handle.remove()
        step(model, optimizer)
        assert not zeros(model, first)
        assert zeros(model, second)

    def test_leaves_momentum_and_gradients_alone(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        mask = random_mask(model)
        mask.enforce(model, optimizer)
        step(model, optimizer)
        gradient = model[3].weight.grad
        assert (gradient != 0).any()
        assert torch.equal(optimizer.state[model[3].weight]["momentum_buffer"], gradient)


def shapes():
    return st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)


class TestFile:
    def test_the_same_mask_is_the_same_file(self, tmp_path):
        """Its header would otherwise be in another order in every process."""
        mask = lossprune.Mask({f"{i}.weight": torch.arange(i + 3) % 2 == 0 for i in range(9)})
        mask.save(tmp_path / "mask.safetensors")
        contents = (tmp_path / "mask.safetensors").read_bytes()
        header = contents[8 : 8 + int.from_bytes(contents[:8], "little")]
        names = [name for name, _ in json.loads(header, object_pairs_hook=list)]
        assert names == sorted(names)
        assert len(header) % 8 == 0

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(shapes=shapes(), seed=st.integers(0, 1000))
    def test_round_trip(self, tmp_path_factory, shapes, seed):
        generator = torch.Generator().manual_seed(seed)
        kept = {
            f"layer.{i}.weight": torch.rand(shape, generator=generator) < 0.5
            for i, shape in enumerate(shapes)
        }
        mask = lossprune.Mask(kept, criterion="OBD")
        path = tmp_path_factory.mktemp("mask") / "mask.safetensors"

        mask.save(path)
        loaded = lossprune.Mask.load(str(path))

        assert loaded == mask
        assert list(loaded) == list(mask)
        assert (loaded.sparsity, loaded.criterion) == (mask.sparsity, "OBD")

    @pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17])
    def test_odd_sizes(self, tmp_path, size):
        kept = (torch.arange(size) % 3) > 0
        lossprune.Mask({"a": kept}).save(tmp_path / "m")
        assert torch.equal(lossprune.Mask.load(tmp_path / "m")["a"], kept)

    def test_any_memory_layout(self, tmp_path):
        kept = torch.rand(3, 4, 5, 2).to(memory_format=torch.channels_last) < 0.5
        mask = lossprune.Mask({"a": kept, "b": kept[0, 0].T, "c": torch.ones(1).bool().expand(9)})
        mask.save(tmp_path / "m")
        assert lossprune.Mask.load(tmp_path / "m") == mask

    def test_loaded_mask_can_be_applied(self, tmp_path):
        model = network()
        random_mask(model).save(tmp_path / "m")
        mask = lossprune.Mask.load(tmp_path / "m")
        mask.apply_(model)
        assert zeros(model, mask)

    def test_no_criterion(self, tmp_path):
        lossprune.Mask({"a": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "m")
        assert lossprune.Mask.load(tmp_path / "m").criterion is None

    def test_one_bit_a_weight(self, tmp_path):
        lossprune.Mask({"a": torch.rand(800, 1000) < 0.5}).save(tmp_path / "m")
        assert 100_000 <= os.path.getsize(tmp_path / "m") < 100_500

    def test_is_an_ordinary_safetensors_file(self, tmp_path):
        mask = lossprune.Mask(
            {"a": torch.tensor([True, False, True, True, False, True, True, True])}
        )
        mask.save(tmp_path / "m")
        assert load_file(tmp_path / "m")["a"].tolist() == [0b10110111]

    def test_overwrites(self, tmp_path):
        for keep in (0.2, 0.8):
            mask = random_mask(network(), keep)
            mask.save(tmp_path / "m")
        assert lossprune.Mask.load(tmp_path / "m") == mask

    def test_leaves_one_file_with_the_usual_permissions(self, tmp_path):
        (tmp_path / "plain").touch()
        random_mask(network()).save(tmp_path / "m")
        assert (tmp_path / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode
        assert sorted(os.listdir(tmp_path)) == ["m", "plain"]

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
            lossprune.Mask.load(tmp_path / "nowhere.safetensors")
        with pytest.raises(FileNotFoundError, match="no mask at"):
            lossprune.Mask.load(tmp_path)

    def test_folder_that_does_not_exist(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
            random_mask(network()).save(tmp_path / "nowhere" / "m")

    def test_every_truncation_is_refused(self, tmp_path):
        path = tmp_path / "kept.mask"
        random_mask(network()).save(path)
        whole = path.read_bytes()
        for length in range(0, len(whole), 5):
            path.write_bytes(whole[:length])
            with pytest.raises(PruningError, match=r"kept\.mask"):
                lossprune.Mask.load(path)

    def test_other_files_are_refused(self, tmp_path):
        path = tmp_path / "kept.mask"
        path.write_bytes(b"not safetensors at all, but long enough to hold a length")
        with pytest.raises(PruningError, match="not a readable safetensors file"):
            lossprune.Mask.load(path)
        save_file({"a": torch.zeros(3)}, path)
        with pytest.raises(PruningError, match="not a mask of lossprune"):
            lossprune.Mask.load(path)

    def test_masks_of_older_versions_have_no_digest_and_load(self, tmp_path):
        mask = random_mask(network())
        mask.save(tmp_path / "m")
        self.rewrite(tmp_path / "m")
        assert lossprune.Mask.load(tmp_path / "m") == mask

    def test_every_changed_byte_is_noticed(self, tmp_path):
        path = tmp_path / "kept.mask"
        random_mask(network()).save(path)
        whole = path.read_bytes()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            path.write_bytes(changed)
            with pytest.raises(PruningError, match=r"kept\.mask"):
                lossprune.Mask.load(path)

    def test_forged_files_without_a_digest_are_masks_or_refused(self, tmp_path):
        path = tmp_path / "kept.mask"
        random_mask(network()).save(path)
        self.rewrite(path)
        whole, generator = path.read_bytes(), random.Random(0)
        for _ in range(300):
            changed = bytearray(whole)
            for _ in range(generator.choice((1, 2, 8))):
                place = generator.randrange(len(changed))
                changed[place] = generator.choice(b'[]{}",:-90eA\0\xff')
            path.write_bytes(changed)
            with contextlib.suppress(PruningError):
                lossprune.Mask.load(path)

    def rewrite(self, path, *, tensors=None, **metadata):
        """Write a mask file with some of its contents replaced; None takes an entry away."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            contents = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            entries = {**file.metadata(), "sha256": None, **metadata}
        save_file(
            tensors if tensors is not None else contents,
            path,
            metadata={key: value for key, value in entries.items() if value is not None},
        )

    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param({"tensors": {"a": torch.zeros(2, dtype=torch.uint8)}}, id="bits changed"),
            pytest.param({"tensors": {"a": torch.ones(3, dtype=torch.uint8)}}, id="too many bits"),
            pytest.param({"tensors": {"a": torch.ones(2)}}, id="not bits"),
            pytest.param({"tensors": {"b": torch.ones(2, dtype=torch.uint8)}}, id="other name"),
            pytest.param({"shapes": json.dumps({"a": [99]})}, id="other shape"),
            pytest.param({"shapes": json.dumps({"a": [-9]})}, id="negative shape"),
            pytest.param({"shapes": json.dumps({})}, id="no shapes"),
            pytest.param({"shapes": json.dumps([1, 2])}, id="shapes of another kind"),
            pytest.param({"shapes": "{"}, id="shapes unreadable"),
            pytest.param({"shapes": '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}"}, id="deep shape"),
            pytest.param({"shapes": '{"a": [9], "a": [9]}'}, id="one name twice"),
            pytest.param({"shapes": json.dumps({"a": [9.0]})}, id="not a whole number"),
            pytest.param({"shapes": json.dumps({"a": [True, 9]})}, id="not a number"),
            pytest.param({"shapes": json.dumps({"a": 9})}, id="not a list"),
            pytest.param({"shapes": json.dumps({"a": [1] * 64 + [9]})}, id="too many dimensions"),
            pytest.param({"shapes": json.dumps({"a": [10**11]})}, id="far larger than its bits"),
            pytest.param({"shapes": json.dumps({"a": [9], "b": [0, 10**30]})}, id="overflows"),
            pytest.param({"tensors": {"a": torch.tensor([170, 129]).byte()}}, id="bits beyond"),
            pytest.param(
                {"tensors": {"a": torch.tensor([170, 128]).byte(), "b": torch.zeros(0)}}, id="more"
            ),
            pytest.param({"note": "?"}, id="more metadata"),
            pytest.param({"shapes": None}, id="shapes missing"),
            pytest.param({"sparsity": "0.123"}, id="other sparsity"),
            pytest.param({"sparsity": None}, id="sparsity missing"),
            pytest.param({"criterion": None}, id="criterion missing"),
        ],
    )
    def test_contents_that_contradict_each_other_are_refused(self, tmp_path, damage):
        path = tmp_path / "kept.mask"
        lossprune.Mask({"a": torch.arange(9) % 2 == 0}).save(path)
        self.rewrite(path, **damage)
        with pytest.raises(PruningError, match=r"kept\.mask"):
            lossprune.Mask.load(path)
