"""What a whole clip would take on a GPU that is not at hand: attention from the cost model, the rest by counting.

Attention and its exchanges are `schedule.advice`'s predictions for one layer. Everything else is operations over a
rate and bytes over a bandwidth, from the catalogue: coarse, and the same for every method, so that it decides the
attention's share of a clip (Amdahl) and nothing else. Pure Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from hcms.clip import ClipShape, layer_flops
from hcms.schedule.advice import Advice, advise
from hcms.schedule.catalogue import Gpu
from hcms.schedule.cost import Workload
from hcms.schedule.cut import format_cut
from hcms_lab.ground.model_config import ModelConfig

GEMM_SHARE = 0.8  # of the data sheet's rate, where nobody published a measured one
DECODE_SHARE = 0.125  # of the bfloat16 rate: float32 convolutions in TF32, at a quarter of that rate
MEMORY_SHARE = 0.8  # of the data sheet's bandwidth, for element-wise operations
# Bytes that a block's element-wise operations read and write for each element of its hidden state, run one by one in
# bfloat16 with float32 modulation: three norms with modulation 92, two residuals 68, cross-attention's 6, two RMS
# norms 8, rotary embedding 60, GELU on the 2.7 times wider feed-forward 11.
ELEMENTWISE_BYTES = 245
ASSUMED = (
    f"matrix products at {GEMM_SHARE:.0%} of the data sheet's rate where no measured one is known",
    f"decoding at {DECODE_SHARE:.1%} of the bfloat16 rate (float32 convolutions in TF32)",
    f"element-wise operations move {ELEMENTWISE_BYTES} bytes an element a block at {MEMORY_SHARE:.0%} of the bandwidth",
)


@dataclass(frozen=True)
class ClipPrediction:
    """A clip on one GPU type, rank count and link. ms a clip.

    Args:
        advice: the prediction for one attention layer.
        attention_ms: by method, attention with its exchanges, over all layers, guidance and steps.
        rest_ms: everything else of a clip, by part (names of `breakdown.PARTS`).
        steps: denoising steps, each of one forward, or two with guidance.
        assumed: inputs that nobody published.
    """

    advice: Advice
    attention_ms: dict[str, float]
    rest_ms: dict[str, float]
    steps: int
    assumed: tuple[str, ...]

    def clip_ms(self, method: str) -> float:
        return self.attention_ms[method] + sum(self.rest_ms.values())

    @property
    def share(self) -> float:
        """Of a clip under `ulysses`, the share of attention with its exchanges."""
        return self.attention_ms["ulysses"] / self.clip_ms("ulysses")

    def attention_speedup(self, method: str) -> float:
        return self.attention_ms["ulysses"] / self.attention_ms[method]

    def clip_speedup(self, method: str) -> float:
        """Amdahl's law, since nothing but attention differs."""
        return self.clip_ms("ulysses") / self.clip_ms(method)

    @property
    def cut(self) -> str:
        """The best cut of a rank's heads."""
        return format_cut(self.advice.choice.cut)


def weights_gb(model: ModelConfig) -> float:
    """10^9 bytes of the matrices that a rank holds unsharded: the experts and the text encoder, at 2 bytes a number."""
    t, e = model.transformer, model.text_encoder
    d = int(t["num_attention_heads"]) * int(t["attention_head_dim"])
    block = 8 * d * d + 2 * d * int(t["ffn_dim"])
    width, inner = int(e["d_model"]), int(e["num_heads"]) * int(e["d_kv"])
    layer = 4 * width * inner + 3 * width * int(e["d_ff"])
    numbers = model.experts * int(t["num_layers"]) * block + int(e["num_layers"]) * layer + int(e["vocab_size"]) * width
    return 2e-9 * numbers


def predict_clip(
    gpu: Gpu, model: ModelConfig, clip: ClipShape, ranks: int, *, link: str | None = None
) -> ClipPrediction:
    """Predict a clip of `model` on `ranks` GPUs, unsharded, text encoder and VAE on every rank.

    Raises:
        ValueError: ranks that do not divide heads or tokens, or a link that connects fewer.
    """
    heads, head_dim, layers = (
        int(model.transformer[k]) for k in ("num_attention_heads", "attention_head_dim", "num_layers")
    )
    width = heads * head_dim
    workload = Workload(clip.tokens, heads, ranks, head_dim, 1, model.dtype)
    advice = advise(gpu, workload, link=link)
    forwards = model.steps * (2 if model.guidance > 1 else 1)
    calls = forwards * layers
    assumed = [*advice.assumed, *ASSUMED]
    gemm = gpu.numbers.get("gemm_tflops")
    peak = gpu.numbers["bf16_tflops"].value
    memory_gbps = gpu.numbers["memory_gbps"].value
    assert peak is not None and memory_gbps is not None
    tflops = gemm.value if gemm is not None and gemm.value is not None else GEMM_SHARE * peak
    flops = layer_flops(clip.tokens, model.text_tokens, width, int(model.transformer["ffn_dim"]))

    def product_ms(part: str) -> float:
        return calls * flops[part] / ranks / (tflops * 1e9)

    local_elements = ceil(clip.tokens / ranks) * width
    elementwise_ms = calls * local_elements * ELEMENTWISE_BYTES / (MEMORY_SHARE * memory_gbps * 1e6)
    pixels = clip.frames * clip.height * clip.width
    decode_ms = pixels * (model.decode_mflop_a_pixel or 0.0) / (DECODE_SHARE * peak * 1e3)
    a_layer = {
        "ulysses": advice.ulysses_ms,
        "ulysses-packed": advice.ulysses_packed_ms,
        "hcms": advice.hcms_ms,
        "ring": advice.ring_ms,
    }
    return ClipPrediction(
        advice,
        {method: calls * ms for method, ms in a_layer.items()},
        {
            "self_projections": product_ms("self_projections"),
            "cross_attention": product_ms("cross_attention"),
            "feed_forward": product_ms("feed_forward"),
            "transformer_rest": elementwise_ms,
            "vae_decode": decode_ms,
        },
        model.steps,
        tuple(dict.fromkeys(assumed)),
    )
