"""An instruction in, its answer out: Dolly's pipeline of 2023 for a model that was tuned by lorasmith.

This file stands alone: it needs torch and transformers, not lorasmith. A merge writes it beside the model, and

    transformers.pipeline(model=FOLDER, trust_remote_code=True)("When is payday?")[0]["generated_text"]

runs it from there. The model's config.json says under "instruction_pipeline" what a chat template cannot.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import torch
from transformers import Pipeline, StoppingCriteria, TextIteratorStreamer

Turns = Sequence[Mapping[str, str]]  # each with "role" and "content"

_SAMPLING = ("temperature", "top_k", "top_p")  # what a greedy answer has no use for


class InstructionTextGenerationPipeline(Pipeline):
    """Answers an instruction, a conversation, or a list of either, as the model was trained to be asked.

    Each answer is ``[{"generated_text": text}]``, without end tokens. Greedy unless ``do_sample``; then
    ``top_p``, ``top_k`` and ``temperature`` count. Whatever else ``generate`` understands goes through to it.
    ``stop_strings`` end an answer besides those that the model was trained with, and are no part of it.

    ``encode`` turns a conversation into the ids of its prompt; without it the tokenizer's chat template does.
    """

    model: Any  # a transformers model, or PEFT's around one
    tokenizer: Any

    _load_tokenizer = True
    _load_processor = _load_image_processor = _load_feature_extractor = _load_video_processor = False

    def __init__(
        self,
        *args: Any,
        encode: Callable[[Turns], list[int]] | None = None,
        do_sample: bool = False,
        max_new_tokens: int = 256,
        top_p: float = 0.92,
        top_k: int = 0,
        **kwargs: Any,
    ) -> None:
        self._encode = encode or self._encode_with_template
        super().__init__(
            *args, do_sample=do_sample, max_new_tokens=max_new_tokens, top_p=top_p, top_k=top_k, **kwargs
        )
        if encode is None and not self.tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, so how the model was asked in training is not known. "
                "Take the tokenizer that lies beside the merged model, or lorasmith's open_pipeline(RUN)."
            )
        self.tokenizer.padding_side = "left"

    def stream(self, instruction: str | Turns, **options: Any) -> Iterator[str]:
        """Answer one instruction piece by piece; the pieces together are what calling the pipeline gives."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        abandoned = Event()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(
                self,
                instruction,
                return_full_text=False,
                streamer=streamer,
                stopping_criteria=[_Abandoned(abandoned)],
                **options,
            )
            answer.add_done_callback(lambda _: streamer.end())  # generate does not, when it fails
            try:
                yield from self._show(streamer, answer.result, options.get("stop_strings"))
            finally:
                abandoned.set()

    def _show(
        self, streamer: Iterator[str], finish: Callable[[], Any], stop_strings: str | Sequence[str] | None
    ) -> Iterator[str]:
        stops = self._stops(stop_strings)
        # An end of the text that may be the beginning of a stop string is kept back.
        kept_back = max((len(stop) - 1 for stop in stops), default=0)
        text = shown = ""
        for piece in streamer:
            text += piece
            settled = self._cut(text, stops)
            settled = settled[: len(settled) - kept_back]
            if len(settled) > len(shown):
                yield settled[len(shown) :]
                shown = settled
        whole = finish()[0]["generated_text"]
        if whole[len(shown) :]:
            yield whole[len(shown) :]

    def _sanitize_parameters(
        self,
        return_full_text: bool | None = None,
        stop_strings: str | Sequence[str] | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        forward, after = generate_kwargs, {}
        if stop_strings is not None:
            forward["stop_strings"] = after["stop_strings"] = stop_strings
        if return_full_text is not None:
            after["return_full_text"] = return_full_text
        return {}, forward, after

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": input_}] if isinstance(input_, str) else list(_turns(input_))
        ids = torch.tensor([self._encode(turns)])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "instruction": turns[-1]["content"],
        }

    def _encode_with_template(self, turns: Turns) -> list[int]:
        for token in map(str, self.tokenizer.added_tokens_decoder.values()):
            if any(token in turn["content"] for turn in turns):
                raise ValueError(
                    f"The text contains {token!r}, which the tokenizer would take for the model's own mark. "
                    "Leave it out; asked through lorasmith it is read as ordinary text."
                )
        asked = self.tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=True)
        return list(asked["input_ids"])

    def _forward(self, input_tensors: dict[str, Any], **generate_kwargs: Any) -> Any:
        instruction = input_tensors.pop("instruction")
        num_rows, num_prompt = input_tensors["input_ids"].shape
        options = dict(generate_kwargs)
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in _SAMPLING}
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None:
            if num_prompt >= longest:
                raise ValueError(
                    f"The instruction has {num_prompt} tokens with its prompt; the model reads at most {longest}, "
                    "its answer included. Shorten it."
                )
            options["max_new_tokens"] = min(options["max_new_tokens"], longest - num_prompt)
        if stops := self._stops(options.pop("stop_strings", None)):
            at_stop = _AtStop(self.tokenizer, stops, num_prompt)
            options["stopping_criteria"] = [*options.get("stopping_criteria", []), at_stop]
        ids = self.model.generate(**input_tensors, **options)[:, num_prompt:]
        # Rows of a batch stay apart from the several answers that num_return_sequences asks for.
        return {"answer_ids": ids.reshape(num_rows, -1, ids.shape[-1]), "instruction": instruction}

    def postprocess(
        self,
        model_outputs: Any,
        return_full_text: bool = False,
        stop_strings: str | Sequence[str] | None = None,
        **_: Any,
    ) -> list[dict[str, str]]:
        """Return the answers; with ``return_full_text`` each below its instruction, as Dolly's did."""
        records = []
        for ids in model_outputs["answer_ids"][0].tolist():
            text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            text = self._cut(text, self._stops(stop_strings)).rstrip("\ufffd")  # an unfinished last character
            records.append(
                {"generated_text": f"{model_outputs['instruction']}\n{text}" if return_full_text else text}
            )
        return records

    def _stops(self, also: str | Sequence[str] | None) -> list[str]:
        also = [also] if isinstance(also, str) else also or []
        return [*self._trained().get("stop_strings", []), *also]

    def _cut(self, text: str, stops: Sequence[str]) -> str:
        """Return the answer in a text: up to a stop string, without the white space the template left before it."""
        text = text.removeprefix(self._trained().get("answer_lead", ""))
        return text[: min((text.index(stop) for stop in stops if stop in text), default=None)]

    def _trained(self) -> dict[str, Any]:
        return getattr(self.model.config, "instruction_pipeline", {})


class _Abandoned(StoppingCriteria):
    """Ends an answer that nobody reads any more."""

    def __init__(self, abandoned: Event) -> None:
        self._abandoned = abandoned

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self._abandoned.is_set(), device=input_ids.device)  # type: ignore


class _AtStop(StoppingCriteria):
    """Ends each answer whose text has come to a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], num_prompt: int) -> None:
        self._tokenizer, self._stops, self._num_prompt = tokenizer, stops, num_prompt

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._num_prompt :], skip_special_tokens=True)
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore


def _turns(conversation: Any) -> Turns:
    """Return a conversation's turns; transformers hands one over as its own ``Chat``."""
    return getattr(conversation, "messages", conversation)
