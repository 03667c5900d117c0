"""A fused model of transformers in the tools that people put around it, one test each."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("transformers")

import fused_attn
from fused_attn.integrations import transformers as door
from tests.cases import transformers_models as zoo

pytestmark = [
    pytest.mark.usefixtures("one_thread", "registered"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def registered() -> Iterator[None]:
    door.register()
    yield
    door.unregister()


def fused(name: str) -> nn.Module:
    model = zoo.make(name, zoo.OURS)
    assert fused_attn.fuse(model).swapped
    return model


def batch() -> dict[str, Tensor]:
    given = zoo.inputs("Llama")
    return {**given, "labels": given["input_ids"]}


def test_peft_trains_adapters_of_a_fused_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "gate_proj"], init_lora_weights=False
    )
    ours, theirs = (peft.get_peft_model(m, config) for m in (fused("Llama"), zoo.make("Llama")))
    ours.load_state_dict(theirs.state_dict())
    losses = []
    for model in (ours, theirs):
        loss = model(**batch()).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-3, atol=1e-5)
    merged = ours.merge_and_unload()
    expected = theirs.merge_and_unload()
    found = (zoo.logits(model, zoo.inputs("Llama")) for model in (merged, expected))
    assert zoo.difference(*found) <= zoo.LIMIT


def test_accelerate_prepares_and_trains() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = fused("Llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(4):
        loss = model(**batch()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_accelerate_offloads_layers_of_a_fused_model() -> None:
    """Its hooks put a `forward` of their own on each module."""
    accelerate = pytest.importorskip("accelerate")
    model = fused("Llama")
    expected = zoo.logits(model, zoo.inputs("Llama"))
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    with torch.no_grad():
        assert zoo.difference(zoo.logits(offloaded, zoo.inputs("Llama")), expected) <= zoo.LIMIT


def test_lightning_fits(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = fused("Llama")
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            self.losses.append(float(loss))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    rows = [dict(zip(batch(), row, strict=True)) for row in zip(*batch().values(), strict=True)]
    loader = torch.utils.data.DataLoader(rows, batch_size=zoo.BATCH)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert len(module.losses) == 4
    assert module.losses[-1] < module.losses[0]


def test_safetensors_of_a_fused_model_load_into_a_plain_one(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = fused("T5")  # with tied weights
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    plain = zoo.make("T5")
    for parameter in plain.parameters():
        nn.init.zeros_(parameter)
    safetensors.load_model(plain, str(tmp_path / "model.safetensors"))
    found = (zoo.logits(m, zoo.inputs("T5")) for m in (plain, model))
    assert zoo.difference(*found) <= zoo.LIMIT
    model.save_pretrained(tmp_path / "model")
    again = type(plain).from_pretrained(tmp_path / "model", attn_implementation=zoo.OURS)
    assert door.check(again)
    found = (zoo.logits(m, zoo.inputs("T5")) for m in (again, model))
    assert zoo.difference(*found) <= zoo.LIMIT


class Logits(nn.Module):
    """A model that gives a tensor, as exporters like it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = fused(name).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return found


def test_export_and_save(tmp_path: Path) -> None:
    model, given = Logits("BERT"), zoo.inputs("BERT")
    exported = torch.export.export(model, tuple(given.values()))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    found = loaded(*given.values())
    torch.testing.assert_close(found, model(**given), rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """Small: the compiler's time is the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = fused_attn.FusedLayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.norm(x).unflatten(-1, (2, 8))
        y: Tensor = fused_attn.attention(heads, heads, heads, layout="blhd", causal=True)
        return y.flatten(2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor(tmp_path: Path) -> None:
    model, x = Block().eval(), torch.randn(2, 5, 16)
    fast = {
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.precompile_headers": False,
    }
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, (x,)),
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs=fast,
        )
        found = torch._inductor.aoti_load_package(package)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, given = Logits("BERT"), zoo.inputs("BERT")
    program = torch.onnx.export(model, tuple(given.values()), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    values = [value.numpy() for value in given.values()]
    [found] = session.run(None, dict(zip(names, values, strict=True)))
    expected = model(**given).detach()
    real = given["attention_mask"].bool()
    assert zoo.difference(torch.from_numpy(found)[real], expected[real]) <= 10 * zoo.LIMIT


def test_the_profiler_shows_what_ran() -> None:
    model, given = fused("Llama"), zoo.inputs("Llama")
    zoo.logits(model, given)
    backend = fused_attn.last_backend()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        zoo.logits(model, given).sum().backward()
    names = [event.name for event in seen.events()]
    assert names.count(f"fused_attn::attention[{backend}]") == 2
    assert names.count(f"fused_attn::attention_backward[{backend}]") == 2
    assert any(name.startswith("fused_attn::layer_norm[") for name in names)
    assert any(name.startswith("fused_attn::bias_activation[") for name in names)
