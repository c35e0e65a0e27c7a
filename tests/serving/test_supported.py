"""The releases of vLLM that are supported stand in the package's requirements alone."""

from packaging.requirements import Requirement

from efx_plugin.serving import supported_vllm


def test_they_are_a_range_with_both_ends():
    requirement = Requirement(supported_vllm())
    assert requirement.name == "vllm"
    assert {one.operator for one in requirement.specifier} == {">=", "<"}
