"""ModelService: what is loaded, and its tokenizer."""

from __future__ import annotations

from hsrpc.plan.plan import Plan
from hsrpc.plan.sizes import ModelSizes
from hsrpc.schedule.blocks import BlockKind
from hsrpc.server.grpc.caller import current_caller
from hsrpc.server.grpc.messages import field_paths, model_of, read_text_or_chat
from hsrpc.server.service import Service
from hsrpc.v1 import model_pb2


class ModelService:
    """Methods of hsrpc.v1.ModelService."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def get_model(self, request: model_pb2.GetModelRequest) -> model_pb2.GetModelResponse:
        engine = self._service.engine(model_of(request))
        spec = engine.spec
        return model_pb2.GetModelResponse(
            name=self._service.model_names(engine)[0],
            family=spec.family,
            context_length=spec.sizes.context_length,
            max_model_len=engine.max_model_len,
            eos_token_ids=spec.eos_token_ids,
            sizes=_sizes_message(spec.sizes),
            cache=_cache_message(spec.sizes, engine.plan),
            has_chat_template=engine.tokenizer.has_chat_template,
            bos_token_id=spec.bos_token_id,
        )

    async def tokenize(self, request: model_pb2.TokenizeRequest) -> model_pb2.TokenizeResponse:
        prompt = read_text_or_chat(request)
        with field_paths():
            token_ids, text = await self._service.tokenize(model_of(request), prompt, current_caller.get())
        return model_pb2.TokenizeResponse(token_ids=token_ids, text=text)

    async def detokenize(self, request: model_pb2.DetokenizeRequest) -> model_pb2.DetokenizeResponse:
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await self._service.detokenize(
            model_of(request), request.token_ids, current_caller.get(), skip_special_tokens=skip
        )
        return model_pb2.DetokenizeResponse(text=text)


def _sizes_message(sizes: ModelSizes) -> model_pb2.ModelSizes:
    return model_pb2.ModelSizes(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        ffn_size=sizes.ffn_size,
        vocab_size=sizes.vocab_size,
        element_bytes=sizes.compute_bytes,
        layer_bytes=max(layer.weight_bytes for layer in sizes.layers),
        model_bytes=sizes.model_bytes,
        sliding_window=sizes.sliding_window,
    )


def _cache_message(sizes: ModelSizes, plan: Plan) -> model_pb2.CacheDecision:
    return model_pb2.CacheDecision(
        policy=plan.policy.value,
        activation_share=plan.activation_share,
        activation_ratio=sizes.activation_ratio,
        kv_bytes=sizes.max_row_bytes(BlockKind.KV),
        activation_bytes=sizes.max_row_bytes(BlockKind.ACTIVATION),
        explanation=plan.reason,
        format=plan.cache_format.value,
    )
