"""Pins the private parts of vLLM that rollout/ touches; each failure says what changed and where we use it."""

import ast
import inspect
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from deltarl.rollout.engine import check_vllm_version, prepare_environment

prepare_environment()

import vllm  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

ON_CPU = pytest.mark.skipif(not current_platform.is_cpu(), reason="a part of vLLM's CPU platform")


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def source_has(thing, text: str, used: str) -> None:
    name = getattr(thing, "__qualname__", thing)
    assert text in inspect.getsource(thing), f"vLLM changed {name}: {text!r} is gone; used in {used}"


def test_version_is_supported() -> None:
    check_vllm_version()


@ON_CPU
def test_cpu_linears_ask_one_function_before_packing() -> None:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    used = "rollout/engine.py plain_cpu_weights"
    assert parameters(utils.dispatch_cpu_unquantized_gemm) == ["layer", "remove_weight"], used
    source_has(utils.cpu_unquantized_gemm, "layer.cpu_linear(x, weight, bias)", used)
    for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        source_has(
            method.process_weights_after_loading,
            "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm",
            used,
        )


@ON_CPU
def test_small_helpers_compile_with_the_platform_s_backend() -> None:
    from vllm.v1.sample.ops import logprobs

    used = "rollout/engine.py start, so that no C++ compiler is needed"
    source_has(logprobs, "@torch.compile(backend=current_platform.simple_compile_backend)", used)


@ON_CPU
def test_cpu_worker_replaces_set_num_threads() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    source_has(CPUWorker.init_device, "torch.set_num_threads = ", "rollout/engine.py keep_torch_threads")


def test_the_engine_s_model_is_reachable_in_process() -> None:
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.uniproc_executor import UniProcExecutor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    used = "rollout/worker.py VllmWorker.model and close"
    source_has(LLMEngine.__init__, "self.model_executor = self.engine_core.engine_core.model_executor", used)
    source_has(UniProcExecutor._init_executor, "self.driver_worker", used)
    assert hasattr(GPUModelRunner, "get_model"), used
    assert hasattr(InprocClient, "shutdown"), used


def test_the_engine_can_be_stepped() -> None:
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    used = "rollout/worker.py VllmWorker"
    assert parameters(LLMEngine.add_request)[1:4] == ["request_id", "prompt", "params"], used
    source_has(LLMEngine.add_request, "return req_id", used)
    assert parameters(LLMEngine.abort_request)[1:3] == ["request_ids", "internal"], used
    assert hasattr(LLMEngine, "step"), used
    source_has(OutputProcessor.__init__, "self.request_states", used)
    source_has(RequestState.__init__, "self.detokenizer", used)
    source_has(RequestState.__init__, "self.logprobs_processor", used)
    source_has(IncrementalDetokenizer.output_token_ids.fget, "return self.token_ids", used)
    source_has(IncrementalDetokenizer.update, "self.token_ids.extend(new_token_ids)", used)


def test_tokens_that_are_launched_but_not_handed_out_are_counted() -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.llm_engine import LLMEngine

    used = "rollout/worker.py VllmWorker._mark_version and _drop_cached_prefixes"
    source_has(AsyncScheduler._update_after_schedule, "request.num_output_placeholders", used)
    source_has(Scheduler.__init__, "self.requests: dict[str, Request]", used)
    assert parameters(LLMEngine.reset_prefix_cache)[1] == "reset_running_requests", used


def test_engine_arguments_exist() -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    needed = {
        "skip_tokenizer_init",
        "logprobs_mode",
        "generation_config",
        "enable_chunked_prefill",
        "max_num_batched_tokens",
        "mamba_ssm_cache_dtype",
        "enable_prefix_caching",
        "kv_cache_memory_bytes",
        "hf_overrides",
        "compilation_config",
        "enable_flashinfer_autotune",
    }
    assert needed <= known, f"vLLM dropped {sorted(needed - known)}; used in rollout/engine.py start"


def test_sampling_parameters_exist() -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    assert {"logprobs", "seed", "detokenize", "ignore_eos", "output_kind", "stop_token_ids"} <= set(
        parameters(SamplingParams)
    ), "rollout/worker.py VllmWorker"
    assert RequestOutputKind.FINAL_ONLY


def test_a_hybrid_without_state_layers_counts_as_plain() -> None:
    from vllm.config import ModelConfig

    used = "rollout/engine.py start, hf_overrides for arms without KDA layers"
    source_has(ModelConfig.is_hybrid.fget, 'getattr(self.hf_config, "layer_types", None)', used)


def test_latent_attention_can_be_switched_off() -> None:
    from vllm import envs

    assert "VLLM_MLA_DISABLE" in envs.environment_variables, "rollout/plugin.py"


def test_latent_attention_refreshes_its_absorbed_weights_in_place() -> None:
    from vllm.model_executor.layers.attention import MLAAttention

    used = "rollout/sync.py refresh"
    for name in ("W_UV", "W_UK_T"):
        source_has(MLAAttention.process_weights_after_loading, f'replace_parameter(self, "{name}"', used)
    source_has(MLAAttention.process_weights_after_loading, "prefer_copy=True", used)


def test_stacked_layers_say_their_parts() -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    used = "rollout/sync.py engine_tensors"
    source_has(MergedColumnParallelLinear.__init__, "self.output_sizes", used)
    source_has(QKVParallelLinear.__init__, "output_sizes", used)
    source_has(VocabParallelEmbedding.__init__, "self.org_vocab_size", used)


def test_state_cache_interface() -> None:
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator, MambaStateShapeCalculator

    used = "rollout/vllm_states.py LayerStates"
    assert {"get_state_shape", "get_state_dtype", "mamba_type"} == set(MambaBase.__abstractmethods__), used
    assert hasattr(MambaBase, "get_attn_backend"), used
    shapes = MambaStateShapeCalculator.kda_state_shape(1, 6, 32, conv_kernel_size=4)
    assert sorted(shapes[0]) == [3, 3 * 6 * 32] and shapes[1] == (6, 32, 32), used
    assert MambaStateCopyFuncCalculator.kda_state_copy_func(), "rollout/vllm_model.py"


def test_a_builder_of_metadata_gets_the_batch_on_the_host() -> None:
    from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
    from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, mamba_get_block_table_tensor

    used = "rollout/vllm_states.py StateMetadataBuilder"
    needed = {"num_reqs", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "block_table_tensor"}
    gone = needed - {field.name for field in fields(CommonAttentionMetadata)}
    assert not gone, f"vLLM dropped {sorted(gone)}; used in {used}"
    assert parameters(AttentionMetadataBuilder.build)[1:] == [
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ], used
    assert parameters(AttentionMetadataBuilder.__init__)[1:] == [
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    ], used
    assert parameters(mamba_get_block_table_tensor) == [
        "block_table",
        "seq_lens",
        "kv_cache_spec",
        "mamba_cache_mode",
    ], used
    assert NULL_BLOCK_ID == 0, used


def test_latent_attention_takes_any_projection_with_a_weight() -> None:
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

    used = "rollout/vllm_layers.py LatentAttention.latent_attention and vllm_weights.py HeadsUp"
    needed = {
        "num_heads",
        "scale",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "q_lora_rank",
        "kv_lora_rank",
        "kv_b_proj",
        "cache_config",
        "prefix",
    }
    assert needed <= set(parameters(MLAAttention.__init__)), used
    assert parameters(MLAAttention.forward)[1:5] == ["q", "kv_c_normed", "k_pe", "output_shape"], used
    source_has(get_and_maybe_dequant_weights, "layer.quant_method is None", used)


def test_small_gpu_operators_exist() -> None:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.activation import SiluAndMul

    used = "rollout/vllm_weights.py RMSNorm, silu_and_multiply"
    assert parameters(ops.rms_norm) == ["out", "input", "weight", "epsilon"], used
    assert parameters(ops.fused_add_rms_norm) == ["input", "residual", "weight", "epsilon"], used
    source_has(SiluAndMul, "torch.ops._C.silu_and_mul", used)


def test_fused_experts_are_a_function_of_plain_tensors() -> None:
    used = "rollout/vllm_ffn.py MoEFFN.fused"
    path = Path(vllm.__file__).parent / "model_executor/layers/fused_moe/fused_moe.py"
    function = next(
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "fused_experts"
    )
    names = [argument.arg for argument in function.args.args]
    assert names[:5] == ["hidden_states", "w1", "w2", "topk_weights", "topk_ids"], used


def test_decode_steps_can_be_whole_cuda_graphs_without_a_compiler() -> None:
    from vllm.config import CompilationConfig, CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs

    from deltarl.rollout.engine import gpu_settings

    config = CompilationConfig(**gpu_settings(64, triton=True)["compilation_config"])
    assert config.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY and config.mode == 0
    assert config.cudagraph_capture_sizes[-1] == 64
    names = {field.name for field in fields(EngineArgs)}
    assert gpu_settings(64, triton=False).keys() <= names >= gpu_settings(64, triton=True).keys()


def test_a_decode_step_is_made_of_these_parts_of_the_second_model_runner() -> None:
    from vllm.v1.worker.gpu import input_batch

    used = "rollout/vllm_decode.py DecodeSteps"
    lengths = parameters(input_batch.prepare_pos_seq_lens)
    assert lengths == ["idx_mapping", "query_start_loc", "num_computed_tokens", "pos", "seq_lens"], used
    tokens = parameters(input_batch.combine_sampled_and_draft_tokens)[:9]
    assert tokens[:4] == ["input_ids", "idx_mapping", "last_sampled_tokens", "query_start_loc"], used
    assert tokens[4:] == ["seq_lens", "prefill_len", "draft_tokens", "cu_num_logits", "num_logits"], used
    folder = Path(vllm.__file__).parent / "v1/worker/gpu"
    runner, graphs = methods(folder / "model_runner.py"), methods(folder / "cudagraph_utils.py")
    states = methods(folder / "model_states/mamba_hybrid.py")
    assert runner["GPUModelRunner.prepare_attn"] == ["self", "input_batch"], used
    assert runner["GPUModelRunner.sample"] == ["self", "hidden_states", "input_batch", "grammar_output"], used
    names = ["self", "idx_mapping", "sampled_tokens", "num_sampled", "num_rejected", "query_start_loc"]
    assert runner["GPUModelRunner.postprocess_sampled"] == names, used
    assert graphs["ModelCudaGraphManager.run_fullgraph"] == ["self", "desc"], used
    names = ["self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"]
    assert graphs["CudaGraphManager.dispatch"][:5] == names, used
    names = ["input_batch", "cudagraph_mode", "block_tables", "slot_mappings", "attn_groups", "kv_cache_config"]
    assert next(v for k, v in states.items() if k.endswith(".prepare_attn"))[1:7] == names, used


def test_room_for_the_contexts_of_prefills_is_small_where_there_are_none() -> None:
    from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder

    from deltarl.rollout.vllm_layers import CONTEXT_ROWS, keep_context_room_small

    used = "rollout/vllm_layers.py keep_context_room_small"
    source_has(MLACommonMetadataBuilder.__init__, "self.determine_chunked_prefill_workspace_size(", used)
    keep_context_room_small()

    def rows(sequences: int, *, chunked: bool = False, prefixes: bool = False) -> int:
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(enable_chunked_prefill=chunked, max_num_seqs=sequences),
            cache_config=SimpleNamespace(enable_prefix_caching=prefixes, block_size=1424),
            model_config=SimpleNamespace(max_model_len=2304),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        )
        return MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size(config)

    blocks = -(-CONTEXT_ROWS // 1424)
    assert rows(1024) == blocks * 1424 and rows(4) == 4 * 4 * 1424, used
    assert rows(1024, chunked=True) == rows(1024, prefixes=True) in (blocks * 1424, 1024 * 1424), used


def methods(path: Path) -> dict[str, list[str]]:
    """The parameters of every method in a file, by Class.method; read, as it cannot be imported without a GPU."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, ast.FunctionDef):
                found[f"{node.name}.{part.name}"] = [argument.arg for argument in part.args.args]
    return found


def test_the_configuration_has_what_our_class_reads() -> None:
    from vllm.transformers_utils.configs.kimi_linear import KimiLinearConfig

    linear = {"kda_layers": [1], "full_attn_layers": [2], "gdn_layers": [1], "num_heads": 1}
    config = KimiLinearConfig(num_hidden_layers=2, linear_attn_config=linear, rope_theta=5e4, gate_lower_bound=-5.0)
    used = "rollout/vllm_model.py and vllm_layers.py"
    assert [config.is_kda_layer(index) for index in range(2)] == [True, False], used
    assert config.rope_parameters["rope_theta"] == 5e4, used
    assert config.linear_attn_config["gdn_layers"] == [1] and config.gate_lower_bound == -5.0, used
