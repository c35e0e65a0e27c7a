"""The vLLM plugin: sparse compressed-tensors checkpoints, served as they are.

vLLM calls `register` (entry point group `vllm.general_plugins`) in every one of its processes. Importing this module
is cheap and cannot fail: vLLM itself is imported inside.
"""

from importlib.metadata import requires


def register() -> None:
    """Put our configuration in the place of vLLM's own "compressed-tensors"; models without sparsity see no change.

    Where this vLLM does not have what the plugin needs, an error is logged and nothing is registered: dense and
    quantized models are served as ever, and a sparse one meets vLLM's refusal after that line.
    """
    from vllm import __version__ as vllm_version
    from vllm.logger import init_logger

    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from efx_plugin.serving.config import SparseCompressedTensorsConfig
    except Exception as error:
        init_logger("vllm.efx_plugin").error(
            "efx-plugin cannot serve sparse checkpoints in this environment: %s: %s. vLLM is %s; the plugin supports "
            "%s: install one of these next to it (pip install 'efx-plugin[serve]')",
            type(error).__name__,
            error,
            vllm_version,
            supported_vllm(),
        )
        return
    register_quantization_config("compressed-tensors")(SparseCompressedTensorsConfig)


def supported_vllm() -> str:
    """The releases of vLLM that this package requires, as its metadata names them: "vllm<2,>=1"."""
    named = (requirement.partition(";")[0].strip() for requirement in requires("efx-plugin") or ())
    return next(one for one in named if one.startswith("vllm") and not one.startswith("vllm-"))
