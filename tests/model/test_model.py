"""The engine, and a server with several connections, against the model."""

from __future__ import annotations

from hypothesis import settings

from tests.model.clones import CloneMachine
from tests.model.machine import PoolMachine
from tests.model.profiles import profile
from tests.support.targets import EngineTarget, ServerTarget

SERVER_SHARE = 5
"""The examples of which the server is tried on one: each takes a start and a stop."""


class EngineMachine(PoolMachine):
    target_type = EngineTarget


class ServerMachine(PoolMachine):
    target_type = ServerTarget
    connections = 3


TestEngine = EngineMachine.TestCase
TestEngine.settings = profile()

TestServer = ServerMachine.TestCase
TestServer.settings = settings(profile(), max_examples=max(2, profile().max_examples // SERVER_SHARE))


class EngineCloneMachine(CloneMachine):
    target_type = EngineTarget


class ServerCloneMachine(CloneMachine):
    target_type = ServerTarget


TestEngineClones = EngineCloneMachine.TestCase
TestEngineClones.settings = settings(profile(), max_examples=max(2, profile().max_examples // 2))

TestServerClones = ServerCloneMachine.TestCase
TestServerClones.settings = settings(profile(), max_examples=max(2, profile().max_examples // 10))
