"""What we assume of compressed-tensors' private parts."""

import pytest
import torch
from compressed_tensors.compressors import NaiveQuantizationCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.offload import offload_module
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import is_match, update_offload_parameter

from tests.upstream.contract import holds, takes

HOST = "compressed-tensors"
MODIFIER, BLOCKS, ZEROS = "efx_plugin.modifier", "efx_plugin.engine.blocks", "efx_plugin.engine.zeros"
QUANTIZED = "efx_plugin.checkpoint.quantized"


def test_an_offloaded_module_is_known_by_its_parameters():
    layer = torch.nn.Linear(4, 4)
    offload_module(layer, "cpu", "cpu")
    holds(isinstance(layer._parameters, OffloadCache), HOST, "_parameters of an offloaded module is no cache", MODIFIER)
    update_offload_parameter(layer, "weight", torch.ones(4, 4))
    holds((layer.weight == 1).all(), HOST, "update_offload_parameter does not update", ZEROS)


def test_names_and_classes_match_targets():
    layer = torch.nn.Linear(4, 4)
    for target in (["Linear"], ["re:.*q_proj"], ["a.q_proj"]):
        holds(is_match("a.q_proj", layer, target), HOST, f"is_match does not find {target}", BLOCKS)
    holds(not is_match("a.q_proj", layer, ["Conv2d"]), HOST, "is_match finds another class", BLOCKS)
    holds(not is_module_quantized(layer), HOST, "is_module_quantized takes a plain layer", MODIFIER)


@pytest.mark.parametrize("columns", [8, 9])
def test_bytes_are_packed_into_words_and_back(columns):
    user = "efx_plugin.checkpoint.formats.pack_quantized"
    weight = torch.randint(-128, 128, (3, columns), dtype=torch.int8)
    words = pack_to_int32(weight, num_bits=8)
    shape = (words.dtype, tuple(words.shape))
    holds(shape == (torch.int32, (3, (columns + 3) // 4)), HOST, f"pack_to_int32 gives {shape}", user)
    bytes_ = unpack_from_int32(words, num_bits=8, shape=weight.shape)
    holds(torch.equal(bytes_, weight), HOST, "unpack_from_int32 gives other values than were packed", user)


def test_quantized_weights_are_written_and_read():
    takes(NaiveQuantizationCompressor.compress, ["state_dict", "scheme"], HOST, QUANTIZED)
    takes(NaiveQuantizationCompressor.decompress, ["state_dict", "scheme"], HOST, QUANTIZED)
    takes(infer_module_format, ["module_type", "scheme"], HOST, QUANTIZED)
