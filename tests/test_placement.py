"""How exactly products are computed, as torch's own settings tell."""

import pytest
import torch
from torch import nn

from spectralvae.runtime.placement import exact_float32, set_arithmetic
from spectralvae.training.supervision import Supervision

PRODUCTS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)


@pytest.fixture
def restored():
    """torch's settings, of the whole process, as they were."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before
    for kernel in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(True)


@pytest.mark.parametrize("tf32", [True, False])
def test_inference_is_exact_whatever_training_has_chosen(restored, tf32):
    set_arithmetic(torch.device("cpu"), tf32=tf32)
    with exact_float32():
        assert [backend.fp32_precision for backend in PRODUCTS] == ["ieee", "ieee"]
    assert [backend.fp32_precision == "tf32" for backend in PRODUCTS] == [tf32, tf32]
    # torch.export reads the older names, and refuses to where only the newer ones were set
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
    torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))


def test_on_gpus_nothing_adds_up_in_random_order(restored):
    set_arithmetic(torch.device("cuda"), tf32=False)
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cuda.flash_sdp_enabled()
    assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


def test_first_weights_of_a_head_leave_random_states_alone(monkeypatch):
    """Those of GPUs too, which dropout there draws from."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    head = Supervision({"NO2": 1.0}, 4, [8], seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
    again = Supervision({"NO2": 1.0}, 4, [8], seed=3)
    pairs = zip(head.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = Supervision({"NO2": 1.0}, 4, [8], seed=4)
    assert not torch.equal(
        nn.utils.parameters_to_vector(head.parameters()), nn.utils.parameters_to_vector(other.parameters())
    )
