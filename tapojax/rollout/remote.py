"""An engine whose completions come from rollout servers over gRPC.

A batch is cut into requests of a few prompts. Each goes to the live server with least to do; where a server fails, the
same request goes to another one, asking only for the groups that are still missing, so that no group is lost and none
comes twice. Weights go to all live servers before the first request that needs them, see `delivery.py`.
"""

import concurrent.futures
import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grpc
import jax
import numpy as np

from tapojax import weight_sync
from tapojax.models.config import DecoderConfig
from tapojax.rollout import local, sampler, wire
from tapojax.rollout.delivery import FATAL, STEP_BITS, Delivery, Loaded
from tapojax.rpc import client, fleet, threads
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc.limits import Limits
from tapojax.rpc.security import load_security
from tapojax.types import Engine, Prompts, Rollout, Sampling, Scores

SERVICE = pb.DESCRIPTOR.services_by_name["Rollouts"].full_name


class Options(NamedTuple):
    """How to talk to the servers; each is a key of the config section `rollout`."""

    prompts_per_request: int = 0  # 0: a batch is spread evenly over the servers
    deadline_s: float = 600.0  # of one request
    load_deadline_s: float = 600.0  # of one transfer of the weights
    retries: int = 3  # of one request, on other servers
    requests_per_server: int = 8  # at a time; more wait here
    weights_dtype: str = "bfloat16"  # in which weights travel
    delta: bool = True  # send only what changed in weights_dtype
    full_every: int = 50  # versions after which the weights go whole
    shared_folder: str = ""  # that trainer and servers see: weights go through it instead of the wire
    probe_tolerance: float = 0.05  # of the log-probs of the fixed row after each transfer, in nats; inf: no probe
    score_on_server: bool = False  # by the reward servers that the rollout servers were started with
    token_file: str = ""  # what is shown to the servers
    authority_file: str = ""  # who signed the servers' certificates; needed beyond loopback
    certificate_file: str = ""  # of the trainer, for mutual TLS
    key_file: str = ""


def remote_engine(
    addresses: Sequence[str],
    model: DecoderConfig,
    *,
    max_prompt_tokens: int,
    probe: Callable[[Any, Any, Any], Any],
    options: Options = Options(),  # noqa: B008  an immutable value
    in_flight: bool = False,
    limits: Limits = Limits(),  # noqa: B008
) -> Engine:
    """Samples on the servers at `addresses`.

    Args:
      probe: (params, tokens [1, T], mask) -> log-probs [1, T] at temperature 1, by the trainer's own model.
      in_flight: new weights may reach running requests, by `update`.

    Raises:
      ConnectionError: no server answers that serves a model of this shape; it says what is wrong with each.
    """
    remote = _Remote(addresses, model, max_prompt_tokens, probe, options, in_flight, limits)
    return Engine(
        load=remote.load,
        generate=lambda *args, **kwargs: remote.generate(*args, **kwargs)[0],
        generate_scored=remote.generate if options.score_on_server else None,
        score_channels=remote.channels if options.score_on_server else (),
        update=remote.update if in_flight else None,
        close=remote.close,
    )


class Greeting(NamedTuple):
    """What all servers must say of themselves."""

    model: str
    score_channels: tuple[str, ...]


class _Remote:
    """The state behind the engine: the servers, the weights they have, and who is sampling with them."""

    def __init__(self, addresses, model, max_prompt_tokens, probe, options: Options, in_flight: bool, limits: Limits):
        self.max_prompt_tokens, self.options, self.in_flight = max_prompt_tokens, options, in_flight
        files = {name: value for name, value in options._asdict().items() if name.endswith("_file")}
        self.model = sampler.model_digest(weight_sync.shapes(model))
        self.fleet = fleet.make(addresses, SERVICE, self._ask_status, security=load_security(**files), limits=limits)
        self.delivery = Delivery(self.fleet, model, probe, options, limits.chunk_bytes)
        self.sequence = itertools.count()
        self.sampling = 0  # calls of generate that are running
        self.turn = threading.Condition()
        self.at_a_time = len(addresses) * options.requests_per_server
        self.places = threading.Semaphore(self.at_a_time)
        fleet.take(self.fleet, 0, tried=(), wait_s=0.0, over=threading.Event())
        self.channels = self.fleet.said.score_channels
        if options.score_on_server and not self.channels:
            raise ValueError("rollout.score_on_server: the servers have no scorer; start them with --reward_addresses")

    def _ask_status(self, server: fleet.Server, timeout_s: float) -> Greeting:
        """What a server says, which then has the current weights."""
        status = self.delivery.stubs[server.address].Status(pb.StatusRequest(), timeout=timeout_s)
        if status.model != self.model:
            raise fleet.Broken(
                f"{server.address} ({status.engine}) serves a model of other tensors than this config's: start it with "
                "the same --model or --config"
            )
        self.delivery.sync(server, status.version)
        return Greeting(status.model, tuple(status.score_channels))

    # ---- weights

    def load(self, params, version: int) -> Loaded:
        """Version `version` of this session, on every live server; while rows are being sampled with other weights,
        before the first request that asks for it."""
        loaded = self.delivery.publish(params, version)
        with self.turn:
            if self.sampling == 0 and not self._fits(loaded):
                self.delivery.switch(loaded)
        return loaded

    def update(self, params, version: int) -> Loaded:
        """The same while rows are being sampled: their remaining tokens come from the new weights."""
        loaded = self.delivery.publish(params, version)
        with self.turn:
            self.delivery.switch(loaded)
        return loaded

    def _fits(self, loaded: Loaded) -> bool:
        """Whether the servers have these weights, or newer ones where updates come in flight."""
        if (current := self.delivery.current) is None:
            return False
        return current.version == loaded.version or (self.in_flight and current.version > loaded.version)

    @contextlib.contextmanager
    def _using(self, loaded: Loaded):
        """The servers have these weights until the block ends."""
        with self.turn:
            self.turn.wait_for(lambda: self._fits(loaded) or self.sampling == 0)
            if not self._fits(loaded):
                self.delivery.switch(loaded)
            self.sampling += 1
        try:
            yield
        finally:
            with self.turn:
                self.sampling -= 1
                self.turn.notify_all()

    # ---- sampling

    def generate(
        self,
        weights: Loaded,
        prompts: Prompts,
        key,
        *,
        group_size: int,
        sampling: Sampling,
        temperature=None,
        carry=(),
        finished: local.Finished | None = None,
    ) -> tuple[Rollout, Scores, Sequence[str | None]]:
        """Rows as the embedded sampler lays them out, with what the servers' scorers said of them."""
        local.check_prompts(prompts, self.max_prompt_tokens)
        with self._using(weights):
            requests = self._requests(prompts, key, group_size, wire.sampling_message(sampling, temperature, carry))
            groups = self._answers(requests, sampling, finished)
        rows = wire.rollout(
            prompts,
            groups,
            max_prompt_tokens=self.max_prompt_tokens,
            sampling=sampling,
            step_of=lambda version: version % 2**STEP_BITS,
        )
        return rows, *wire.scores(len(prompts.tokens), groups, self.channels)

    def _requests(self, prompts: Prompts, key, group_size: int, sampling: pb.Sampling) -> list[pb.GenerateRequest]:
        count = len(prompts.tokens)
        size = self.options.prompts_per_request or -(-count // len(self.fleet.servers))
        starts = range(0, count, size)
        # a single request takes the key as it is, so that a JAX server gives the rows of the embedded sampler
        keys = [key if len(starts) == 1 else jax.random.fold_in(key, part) for part in range(len(starts))]
        return [
            pb.GenerateRequest(
                request_id=f"{self.delivery.session:x}-{next(self.sequence)}",
                prompts=wire.prompt_messages(
                    prompts, range(start, min(start + size, count)), with_examples=self.options.score_on_server
                ),
                group_size=group_size,
                sampling=sampling,
                key=np.asarray(jax.random.key_data(part_key)).tolist(),
                base_logprobs=True,
                score=self.options.score_on_server,
            )
            for start, part_key in zip(starts, keys, strict=True)
        ]

    def _answers(
        self, requests: Sequence[pb.GenerateRequest], sampling: Sampling, finished: local.Finished | None
    ) -> dict[int, list[pb.Completion]]:
        """All groups by index of their prompts; the first request that fails for good ends the others."""
        over = threading.Event()

        def ask(request: pb.GenerateRequest):
            with self.places:  # other calls of generate have requests, too
                return self._ask(request, sampling, finished, over)

        asked = threads.in_threads(ask, requests, self.at_a_time, name="rollout-request")
        jobs = dict(zip(asked, requests, strict=True))
        groups: dict[int, list[pb.Completion]] = {}
        try:
            for job in concurrent.futures.as_completed([*jobs]):
                groups |= job.result()
                del jobs[job]
        finally:
            over.set()
            for job in jobs:
                job.cancel()
            if jobs:
                self._abort([request.request_id for request in jobs.values()])
        return groups

    def _abort(self, request_ids: Sequence[str]):
        for server in fleet.inside(self.fleet):
            with contextlib.suppress(grpc.RpcError):
                self.delivery.stubs[server.address].Abort(pb.AbortRequest(request_ids=request_ids), timeout=2)

    def _ask(
        self, request: pb.GenerateRequest, sampling: Sampling, finished: local.Finished | None, over: threading.Event
    ) -> dict[int, list[pb.Completion]]:
        """The groups of one request, from one server or, where it fails, the rest from others.

        Raises:
          ValueError: the request can never succeed, or did not in all its tries.
          ConnectionError: no server was alive for all of its time.
        """
        groups: dict[int, list[pb.Completion]] = {}
        problems, tried = list[str](), list[str]()
        wait_s = (self.options.retries + 1) * self.options.deadline_s
        while len(problems) <= self.options.retries:
            self.delivery.steady.wait()
            load, failure = len(request.prompts), None
            server = fleet.take(self.fleet, load, tried=tried, wait_s=wait_s, over=over)
            try:
                return self._listen(server, request, sampling, groups, finished)
            except (client.Failure, fleet.Broken) as error:
                problems, tried = [*problems, str(error)], [*tried, server.address]
                code = error.code if isinstance(error, client.Failure) else None
                if code in FATAL:
                    raise ValueError(str(error)) from error
                # a server that is only busy is not left out, nor one whose request was aborted from here
                busy = code == grpc.StatusCode.RESOURCE_EXHAUSTED
                failure = None if busy or over.is_set() else str(error)
            finally:
                fleet.give_back(self.fleet, server, load, failure=failure)
            over.wait(fleet.pause(len(problems)) if busy else 0)
        raise ValueError(
            f"a request failed {len(problems)} times (rollout.retries={self.options.retries}): {'; '.join(problems)}"
        )

    def _listen(self, server: fleet.Server, request: pb.GenerateRequest, sampling: Sampling, groups, finished):
        """Moves whole groups from a server's stream into `groups`, tells of each, and gives them when all are there."""
        assert self.delivery.current is not None
        request.version = self.delivery.current.version
        del request.skip[:]
        request.skip.extend(groups)
        parts: dict[int, list[pb.Completion]] = {}
        wanted = {prompt.index for prompt in request.prompts}
        with client.failures(server.address):
            stream = self.delivery.stubs[server.address].Generate(request, timeout=self.options.deadline_s)
            for group in itertools.chain.from_iterable(message.groups for message in stream):
                part = parts.setdefault(group.index, [])
                if group.index not in wanted or group.index in groups or group.first_sample != len(part):
                    raise fleet.Broken(f"{server.address} sent {group.index}, {group.first_sample} out of place")
                part.extend(group.completions)
                if group.last:
                    self._check_group(server, part, request, sampling)
                    groups[group.index] = part
                    for sample, completion in enumerate(part if finished is not None else ()):
                        finished(group.index * request.group_size + sample, list(completion.tokens))
        if missing := wanted - groups.keys():
            raise fleet.Broken(f"{server.address} ended the stream without the groups {sorted(missing)[:5]}")
        return groups

    def _check_group(self, server: fleet.Server, group, request: pb.GenerateRequest, sampling: Sampling):
        try:
            wire.check_group(
                group,
                group_size=request.group_size,
                max_tokens=sampling.max_tokens,
                stop_token_ids=sampling.stop_token_ids,
            )
        except ValueError as error:
            raise fleet.Broken(f"{server.address} sent what it was not asked for: {error}") from error

    def close(self):
        self.delivery.carriers.shutdown(wait=False, cancel_futures=True)
        for server in self.fleet.servers:
            server.channel.close()
