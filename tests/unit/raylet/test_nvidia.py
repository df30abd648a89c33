import pytest

from hpcray.raylet.nvidia import kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # As Ray 2.60 names them.
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla T4", "T4"),
        ("Tesla K80", "K80"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 5090", "GeForce-RTX-5090"),
        ("Quadro RTX 6000", "RTX-6000"),
        ("NVIDIA", "NVIDIA"),
        ("", ""),
    ],
)
def test_accelerator_types_are_rays(name, kind):
    assert kind_of(name) == kind
