"""How weights reach rollout servers, and how the trainer makes sure that they did.

All live servers must have taken a version before any of them swaps to it: as a delta where a server has the version
before, whole otherwise. After the swap each is asked for the log-probs of a fixed row, and a server whose answer is not
the trainer's stops the run.

A version on the wire is session · 2^24 + step, where session is new in every trainer process: a server that still has
the weights of another run is never taken for one that has ours.
"""

import concurrent.futures
import contextlib
import functools
import logging
import math
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import jax
import jax.numpy as jnp
import numpy as np

from tapojax import weight_sync
from tapojax.models.config import DecoderConfig
from tapojax.rpc import client, fleet
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc

STEP_BITS = 24
# a call that ends so can never succeed, on any server
FATAL = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
RESEND = (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.FAILED_PRECONDITION)
PROBE_TOKENS = 32
LOG = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """Weights to sample with: what `load` hands out."""

    version: int  # of the wire
    bits: Any  # Hugging Face name -> array of unsigned integers, on the device
    probe: np.ndarray | None  # the trainer's log-probs of the fixed row


class _Updates(NamedTuple):
    """One version for servers that hold `base_version`, and for all others."""

    lock: Any  # one thread makes an update, the others wait for it
    whole: Callable[[], weight_sync.Update]
    delta: Callable[[], weight_sync.Update]
    base_version: int


class Delivery:
    """The weights of the day, and the servers that should have them."""

    def __init__(self, servers: fleet.Fleet, model: DecoderConfig, probe: Callable, options: Any, chunk_bytes: int):
        """`probe` and `options` are those of `remote.remote_engine`."""
        self.fleet, self.model, self.options, self.chunk_bytes = servers, model, options, chunk_bytes
        self.stubs = {server.address: pb_grpc.RolloutsStub(server.channel) for server in servers.servers}
        self.session, self.sent = secrets.randbits(38), 0
        self.current: Loaded | None = None  # what every server inside has
        self.held = dict.fromkeys(self.stubs, -1)  # version by address, as far as we know
        self.steady = threading.Event()  # not set while the servers change to another version
        self.steady.set()
        self.carriers = concurrent.futures.ThreadPoolExecutor(len(self.stubs), "rollout-weights")
        self.row = jnp.arange(PROBE_TOKENS)[None] * 7 % model.vocab_size
        self.probe = jax.jit(
            lambda params: probe(
                jax.tree.map(lambda x: x.astype(options.weights_dtype).astype(x.dtype), params),
                self.row,
                jnp.arange(PROBE_TOKENS)[None] > 0,
            )
        )

    def publish(self, params, version: int) -> Loaded:
        """The params as weights of this session, still on the devices.

        Raises:
          ValueError: the version is no step.
        """
        if not 0 <= version < 2**STEP_BITS:
            raise ValueError(f"version {version} is not a step below 2^{STEP_BITS}")
        number = self.session << STEP_BITS | version
        if self.current is not None and self.current.version == number:
            return self.current
        probe = np.asarray(self.probe(params))[0, 1:] if math.isfinite(self.options.probe_tolerance) else None
        return Loaded(number, weight_sync.publish(params, self.model, self.options.weights_dtype), probe)

    def switch(self, loaded: Loaded):
        """All live servers stage the weights, then swap to them, then answer for the fixed row.

        Raises:
          ConnectionError: for load_deadline_s no server took them.
          ValueError: one answers with other log-probs.
        """
        before, self.sent = self.current, self.sent + 1
        whole = before is None or not self.options.delta or self.sent % self.options.full_every == 0
        self.steady.clear()
        try:
            with self._encoded(loaded, None if whole else before) as updates:
                servers = self._each(fleet.inside(self.fleet), self._stage, updates)
            servers = self._each(servers, self._commit, loaded)
            self.current = loaded
        finally:
            self.steady.set()
        self._each(servers, self._check, loaded)
        fleet.take(self.fleet, 0, tried=(), wait_s=self.options.load_deadline_s, over=threading.Event())

    @contextlib.contextmanager
    def _encoded(self, loaded: Loaded, before: Loaded | None) -> Iterator[_Updates]:
        """The weights as messages: each kind is made when the first server needs it, once for all servers."""
        with contextlib.ExitStack() as stack:

            @functools.cache
            def whole() -> weight_sync.Update:
                update = weight_sync.encode(loaded.bits, version=loaded.version)
                if self.options.shared_folder:
                    return stack.enter_context(weight_sync.shared_folder(update, self.options.shared_folder))
                return update

            @functools.cache
            def delta() -> weight_sync.Update:
                assert before is not None
                numbers = {"version": loaded.version, "base_version": before.version}
                return weight_sync.encode(loaded.bits, before.bits, **numbers)

            yield _Updates(threading.Lock(), whole, delta, -1 if before is None else before.version)

    def _each(self, servers: Sequence[fleet.Server], step: Callable[..., None], *args) -> list[fleet.Server]:
        """Those for which the step worked; the others are left out for a while. A mistake of ours ends it for all."""
        jobs = [self.carriers.submit(step, server, *args) for server in servers]
        done = []
        for server, job in zip(servers, jobs, strict=True):
            try:
                job.result()
                done.append(server)
            except client.Failure as failure:
                if failure.code in FATAL:
                    raise ValueError(str(failure)) from failure
                fleet.leave_out(self.fleet, server, str(failure))
        return done

    def sync(self, server: fleet.Server, version: int):
        """The current weights for a server that comes late or comes back, with `version` of its own."""
        self.steady.wait()
        self.held[server.address] = version
        if (current := self.current) is not None and version != current.version:
            with self._encoded(current, None) as updates:
                self._stage(server, updates)
            self._commit(server, current)
            self._check(server, current)

    def _stage(self, server: fleet.Server, updates: _Updates):
        is_delta = self.held[server.address] == updates.base_version >= 0
        try:
            self._transfer(server, updates, is_delta)
        except client.Failure as failure:
            if failure.code not in RESEND:
                raise
            LOG.warning("weights are sent once more, whole: %s", failure)
            self._transfer(server, updates, False)

    def _transfer(self, server: fleet.Server, updates: _Updates, is_delta: bool):
        with updates.lock:
            update = updates.delta() if is_delta else updates.whole()
        messages = weight_sync.stream(update, chunk_bytes=self.chunk_bytes)
        with client.failures(server.address):
            self.stubs[server.address].LoadWeights(messages, timeout=self.options.load_deadline_s)

    def _commit(self, server: fleet.Server, loaded: Loaded):
        request = pb.CommitRequest(version=loaded.version)
        with client.failures(server.address):
            status = self.stubs[server.address].CommitWeights(request, timeout=self.options.load_deadline_s)
        self.held[server.address] = status.version

    def _check(self, server: fleet.Server, loaded: Loaded):
        """Raises ValueError: the server answers with other log-probs than the trainer's for the same weights."""
        if loaded.probe is None:
            return
        request = pb.LogprobsRequest(rows=[pb.Row(tokens=self.row[0].tolist())])
        with client.failures(server.address):
            reply = self.stubs[server.address].Logprobs(request, timeout=self.options.deadline_s)
        worst = float(np.max(np.abs(np.array(reply.rows[0].logprobs, np.float32) - loaded.probe)))
        if reply.version != loaded.version or not worst <= self.options.probe_tolerance:
            raise ValueError(
                f"rollout server {server.address} gives log-probs {worst:.3g} nats from the trainer's for weights "
                f"{loaded.version % 2**STEP_BITS} (rollout.probe_tolerance={self.options.probe_tolerance}): it serves "
                "other weights or another architecture than it says; check its --model and --dtype, or raise the "
                "tolerance if its precision explains it"
            )
