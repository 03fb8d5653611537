"""The engine: requests in, tokens out, one step at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from engine.batch import SampledToken
from engine.cache.block_manager import BlockManager
from engine.cache.block_pool import BlockPool
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.fingerprint import fingerprint
from engine.loader.checkpoint import Checkpoint, open_checkpoint
from engine.quantize.formats import resolve_quantization
from engine.request import FinishReason, Request, RequestOutput, RequestStatus, TokenLogprobs
from engine.runner.device import prepare_device
from engine.runner.memory import read_memory
from engine.runner.model_runner import LaunchedStep, ModelRunner
from engine.runner.out_of_memory import is_out_of_memory, step_ran_out
from engine.runner.start_forward import start_forward
from engine.runner.start_up import Phase, StartUp
from engine.sampling.sampler import Sampler
from engine.scheduler.scheduler import Scheduler
from engine.speculative.proposer import Proposer
from engine.speculative.speculation import Speculation
from engine.speculative.start_proposer import start_proposer
from engine.stats import EngineStats

STEP_TIME_SMOOTHING = 0.1  # weight of the newest step in the moving average


class LLMEngine:
    """Not thread-safe: one thread adds, aborts and steps (see engine.async_engine)."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        blocks: BlockManager,
        sampler: Sampler,
        *,
        vocab_size: int,
        max_model_len: int,
        fingerprint: str,
        speculation: Speculation | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.fingerprint = fingerprint
        self._runner = runner
        self._scheduler = scheduler
        self._blocks = blocks
        self._sampler = sampler
        self._speculation = speculation
        self._in_flight: LaunchedStep | None = None
        self._num_steps = 0
        self._step_time_s = 0.0
        self._num_prompt_tokens = 0
        self._num_integrity_checks = 0
        self._num_output_tokens = 0

    @classmethod
    def from_path(cls, path: Path, config: EngineConfig, start_up: StartUp | None = None) -> "LLMEngine":
        """Load a model from a directory or a GGUF file. `start_up` shows how far that is, and keeps the memory plan.

        Raises:
            ModelError: the model cannot be loaded.
            ConfigError: the configuration does not fit the model or the device.
        """
        start_up = start_up or StartUp()
        with start_up.phase(Phase.HEADERS):
            checkpoint = open_checkpoint(path)
        return cls.from_checkpoint(checkpoint, config, start_up)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        config: EngineConfig,
        start_up: StartUp | None = None,
        proposer: Proposer | None = None,
    ) -> "LLMEngine":
        """The same from a checkpoint that is open already. proposer: of drafts, with SpeculativeMethod.REMOTE."""
        start_up = start_up or StartUp()
        model = checkpoint.config
        device, dtype = prepare_device(config)
        empty = read_memory(device)
        if proposer is None:
            proposer = start_proposer(config, model, start_up)
        max_model_len = min(config.scheduler.max_model_len, model.max_position_embeddings)
        scheduling = replace(config.scheduler, max_model_len=max_model_len)
        quantization = resolve_quantization(model, config.quantization)
        forward = start_forward(
            checkpoint,
            device,
            dtype,
            quantization,
            config.cache,
            scheduling,
            warm_up=config.warm_up,
            start_up=start_up,
            draft_bytes=read_memory(device).allocated_bytes - empty.allocated_bytes,
        )
        sampler = Sampler(model.eos_token_ids)
        pool = BlockPool(forward.kv_cache.num_blocks, config.cache.block_size, config.cache.enable_prefix_caching)
        blocks = BlockManager(pool)
        speculation = None
        if proposer is not None:
            speculation = Speculation(
                proposer,
                config.speculative.num_draft_tokens,
                scheduling.max_draft_tokens,
                forward.padded_sizes,
                always=config.speculative.always,
            )
        return cls(
            ModelRunner(forward, sampler),
            Scheduler(scheduling, blocks),
            blocks,
            sampler,
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            fingerprint=fingerprint(checkpoint.fingerprint, device, dtype, quantization, config.cache.dtype),
            speculation=speculation,
        )

    def add(self, request: Request) -> None:
        """Queue a request, or one that another engine has begun: its outputs are those from its next token on.

        Raises:
            InvalidRequest: its prompt is empty, too long or holds unknown tokens, or its outputs are complete.
        """
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidRequest("the prompt is empty", "prompt")
        if len(prompt) >= self.max_model_len:
            raise InvalidRequest(
                f"the context length is {self.max_model_len} tokens, and the prompt has {len(prompt)}: "
                "no room for an answer",
                "prompt",
            )
        used = (*prompt, *request.output_token_ids, *request.sampling.logit_bias, *request.sampling.stop_token_ids)
        if min(used) < 0 or max(used) >= self.vocab_size:
            raise InvalidRequest(f"token ids must be between 0 and {self.vocab_size - 1}", "prompt")
        request.sampling = request.sampling.seeded()
        request.max_output_tokens = min(request.sampling.max_tokens, self.max_model_len - len(prompt))
        if len(request.output_token_ids) >= request.max_output_tokens:
            raise InvalidRequest(f"all {request.max_output_tokens} tokens of the answer are there", "max_tokens")
        request.stop_ids = self._sampler.stop_ids(request.sampling)
        request.is_chosen_by_device = self._runner.chooses_on_device(request)
        self._scheduler.add(request)
        self._num_prompt_tokens += len(prompt)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Free a request's blocks now. None if it has ended already."""
        request = self._scheduler.abort(request_id)
        if request is None:
            return None
        if self._speculation:
            self._speculation.forget(request)
        return RequestOutput.last(request, FinishReason.ABORT)

    def step(self) -> list[RequestOutput]:
        """Schedule, run, sample, commit. Returns what became of every request that the step moved on or ended.

        Where the device chooses all tokens of a step itself, the next step is launched before this one is read: the
        host's work and the device's then overlap. What that step computes for a request that this one turns out to
        end is void; it touches only blocks that no later step has been given yet.
        """
        launched, self._in_flight = self._in_flight, None
        if launched is None and self._speculation:
            self._speculation.propose(self._scheduler.running)
        started = perf_counter()
        outputs: list[RequestOutput] = []
        if launched is None:
            step = self._scheduler.schedule()
            outputs += [self._end(request, FinishReason.LENGTH) for request in step.exhausted]
            if step.chunks:
                try:
                    launched = self._runner.launch(step)
                except RuntimeError as error:
                    outputs += self._out_of_memory([chunk.request for chunk in step.chunks], error)
        if launched is not None:
            self._scheduler.commit(launched.step)
            self._in_flight = self._launch_ahead(launched)
            outputs += self._read(launched)
        if not self._scheduler.has_work:
            self._settle()
        self._num_steps += 1
        step_time_s = perf_counter() - started
        self._step_time_s += STEP_TIME_SMOOTHING * (step_time_s - self._step_time_s)
        if launched is not None and self._speculation:
            self._speculation.observe_step(launched.step, step_time_s)
        return outputs

    def prepare_next(self) -> bool:
        """Without work: get one more kind of step ready that loading has left for later. False if none is left."""
        assert not self.has_work, "steps are under way"
        self._settle()
        return self._runner.forward.prepare_next()

    def close(self) -> None:
        """Let go of what lies outside the process, such as a draft model. No more steps."""
        if self._speculation:
            self._speculation.close()

    def _settle(self) -> None:
        """Wait for a step that concerns nobody any more: the device must be done with its buffers."""
        if self._in_flight is not None:
            self._in_flight.outcome.choices()
            self._in_flight = None

    def _launch_ahead(self, launched: LaunchedStep) -> LaunchedStep | None:
        """The step after `launched`, launched too, or None if it has to wait for what that one brings."""
        if not self._runner.can_run_ahead(launched):
            return None
        running = RequestStatus.RUNNING
        live = [request for request in launched.sampling if request.status is running]
        if launched.drafts or (self._speculation and self._speculation.waits_for(live)):
            return None  # what is drafted next hangs on what this one chooses
        if all(len(request.output_token_ids) + 1 >= request.max_output_tokens for request in live):
            return None  # all of them end here
        if self._blocks.pool.num_free_blocks < self._scheduler.num_running:
            return None  # somebody might be preempted, whose pending token would be lost
        if self._scheduler.is_displacement_due:
            return None  # the same
        for request in live:
            request.expect_output()
        step = self._scheduler.schedule(may_displace=False)
        assert not step.preempted
        assert not step.exhausted
        if not step.chunks:
            return None
        try:
            return self._runner.launch(step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None  # nothing of it is committed: it is scheduled again, alone, and fails as a step of its own

    def _read(self, launched: LaunchedStep) -> list[RequestOutput]:
        try:
            tokens = self._runner.read(launched)
        except RuntimeError as error:
            return self._out_of_memory(launched.sampling, error)
        outputs = []
        details, verified = tokens.details, tokens.verified
        for place, (request, token_id) in enumerate(zip(launched.sampling, tokens.token_ids, strict=True)):
            if request.finish_reason is not None:  # it was aborted, or ended, after this step was launched
                request.drop_expected_output()
            elif place in verified:
                outputs.append(self._advance_by_drafts(request, verified[place], len(launched.drafts[place])))
            else:
                outputs.append(self._advance(request, token_id, details.get(place)))
        return outputs

    def _out_of_memory(self, requests: Sequence[Request], error: RuntimeError) -> list[RequestOutput]:
        """End these requests, if that is what the error is."""
        if not is_out_of_memory(error):
            raise error
        message = step_ran_out(error)
        alive = [request for request in requests if request.finish_reason is None]
        return [self._end(request, FinishReason.ERROR, message) for request in alive]

    def _advance(self, request: Request, token_id: int, details: SampledToken | None) -> RequestOutput:
        logprobs: tuple[TokenLogprobs, ...] = ()
        if details is not None:
            if details.error is not None:
                request.drop_expected_output()
                return self._end(request, FinishReason.ERROR, details.error)
            if details.logprobs is not None:
                logprobs = (details.logprobs,)
        request.append_output(token_id)
        self._num_output_tokens += 1
        count = len(request.output_token_ids)
        reason = stop_token_id = None
        if token_id in request.stop_ids and count > request.sampling.min_tokens:
            reason, stop_token_id = FinishReason.STOP, token_id
        elif count >= request.max_output_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._finish(request, reason)
        return RequestOutput(  # by position: half the time of keywords, and a full step makes hundreds
            request.request_id,
            (token_id,),
            logprobs,
            reason,
            stop_token_id,
            None,
            request.num_cached_tokens,
            request.num_drafted_tokens,
            request.num_accepted_tokens,
        )

    def _advance_by_drafts(
        self, request: Request, tokens: Sequence[SampledToken], num_drafted_tokens: int
    ) -> RequestOutput:
        """Append the drafts that are accepted and what was chosen behind them, as far as the request goes."""
        num_accepted_tokens = len(tokens) - 1
        output = RequestOutput(request.request_id)
        for token in tokens:
            following = self._advance(request, token.token_id, token)
            following.token_ids = output.token_ids + following.token_ids
            following.logprobs = output.logprobs + following.logprobs
            output = following
            if output.finish_reason is not None:
                break
        else:
            self._scheduler.accept(request, num_accepted_tokens)
        request.num_drafted_tokens += num_drafted_tokens
        request.num_accepted_tokens += min(num_accepted_tokens, len(output.token_ids))
        if self._speculation:
            self._speculation.observe_round(request, num_drafted_tokens, num_accepted_tokens)
        output.num_drafted_tokens, output.num_accepted_tokens = request.num_drafted_tokens, request.num_accepted_tokens
        return output

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> RequestOutput:
        self._finish(request, reason)
        return RequestOutput.last(request, reason, error)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._scheduler.finish(request, reason)
        if self._speculation:
            self._speculation.forget(request)

    def generate(self, requests: Sequence[Request]) -> list[Request]:
        """Run requests to their end, beside whatever else is queued; for tests, benchmarks and offline use."""
        for request in requests:
            self.add(request)
        while any(request.finish_reason is None for request in requests):
            self.step()
        return list(requests)

    @property
    def dtype(self) -> str:
        """Number format of weights and KV cache, as torch calls it, such as "bfloat16"."""
        return str(self._runner.dtype).removeprefix("torch.")

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        """A snapshot of queue, cache and counters."""
        pool = self._blocks.pool
        return EngineStats(
            num_requests_running=self._scheduler.num_running,
            num_requests_waiting=self._scheduler.num_waiting,
            num_blocks=pool.num_usable_blocks,
            num_blocks_in_use=pool.num_blocks_in_use,
            num_steps=self._num_steps,
            step_time_s=self._step_time_s,
            num_preemptions=self._scheduler.num_preemptions,
            num_integrity_checks=self._num_integrity_checks,
            prefix_cache_queries=self._blocks.prefix_cache_queries,
            prefix_cache_hits=self._blocks.prefix_cache_hits,
            prompt_tokens=self._num_prompt_tokens,
            output_tokens=self._num_output_tokens,
            speculation=self._speculation.stats() if self._speculation else None,
        )

    def check_integrity(self) -> None:
        """Assert that every block is accounted for; cheap enough to run whenever the engine is idle."""
        self._scheduler.check_integrity()
        self._num_integrity_checks += 1
