"""Addresses: each kind of setting leads to one, none shows a password, and wrong arguments are named."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis

import beequeue
from beequeue import ConnectionRefused, Queue, QueueSettings
from beequeue.wire.address import Address
from tests.conftest import MakeQueue, echo

# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        (None, "127.0.0.1:6379/0"),
        ("redis://h:7000/3", "h:7000/3"),
        ("rediss://user:secret@h", "h:6379/0"),
        ("unix:///run/redis.sock?db=2", "/run/redis.sock/2"),
        ({"host": "h", "db": 1, "password": "secret"}, "h:6379/1"),
        ({"socket": "/run/redis.sock"}, "/run/redis.sock/0"),
    ],
)
def test_addresses(setting: Any, shown: str) -> None:
    """C-01, C-02, C-12"""
    assert str(Address(setting)) == repr(Address(setting)) == shown


async def test_a_client_lends_its_settings() -> None:
    client = Redis(host="h", port=7000, db=4, decode_responses=True)
    assert str(Address(client)) == "h:7000/4"
    await client.aclose()


def test_wrong_addresses() -> None:
    with pytest.raises(ValueError, match=r"^redis must be a URL that begins with redis://, .*, valkeys:// or unix://$"):
        Address("h:6379")
    with pytest.raises(TypeError, match="^redis must be a URL, a dict of connection arguments or a client, not int$"):
        Address(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("lend", [True, False], ids=["client", "dict"])
async def test_a_client_and_a_dict_lead_to_the_same_redis(make_queue: MakeQueue, url: str, lend: bool) -> None:
    """C-12; the client itself is left alone"""
    client = Redis.from_url(url, decode_responses=True)
    queue = make_queue(redis=client if lend else Address(url).arguments)
    queue.process(echo)
    assert await (await queue.create_job("x").save()).result() == "x"
    await queue.close()
    assert await client.ping()
    await client.aclose()


async def test_the_callers_arguments_are_not_changed(url: str) -> None:
    """C-19"""
    arguments = {"socket": url.removeprefix("unix://"), "decode_responses": True}
    before = dict(arguments)
    Address(arguments)
    assert arguments == before


async def test_an_unknown_argument_is_named() -> None:
    queue = Queue("q", redis={"hots": "h"})
    with pytest.raises(ConnectionRefused, match="hots"):
        await queue.ready()
    with pytest.raises(ConnectionRefused, match="hots"):
        await queue.close()


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["unix:///a%00b", "rediss://h?ssl_certfile=a%00", "redis://h%00x:1"])
def test_a_url_with_a_nul(url: str) -> None:
    """the message names the part and does not show it: it may be a piece of a password"""
    with pytest.raises(ValueError, match=r"redis must be a URL: \w+ must not contain NUL$"):
        Queue("q", url)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"port": "abc"}, "redis: port must be a number from 1 to 65535, not 'abc'"),
        ({"port": "\u00b2"}, "redis: port must be a number from 1 to 65535, not '\u00b2'"),
        ({"port": 0}, "redis: port must be a number from 1 to 65535, not 0"),
        ({"port": 65_536}, "redis: port must be a number from 1 to 65535, not 65536"),
        ({"port": None}, "redis: port must be a number from 1 to 65535, not None"),
        ({"db": "x"}, "redis: db must be a number from 0 to 2147483647, not 'x'"),
        ({"db": -1}, "redis: db must be a number from 0 to 2147483647, not -1"),
        ({"db": True}, "redis: db must be a number from 0 to 2147483647, not True"),
        ({"host": 5}, "redis: host must be a string, not 5"),
        ({"host": None}, "redis: host must be a string, not None"),
        ({"host": "a..b"}, "redis: host must be a host's name or address, not 'a..b'"),
        ({"host": "a\0b"}, "redis: host must not contain NUL: 'a\\x00b'"),
        ({"path": 5}, "redis: path must be a string, not 5"),
        ({"password": ["secret"]}, "redis: password must be a string, not list"),
        ({"ssl": True, "ssl_keyfile": 5}, "redis: ssl_keyfile must be a string, not 5"),
        ({"socket_connect_timeout": "5"}, "redis: socket_connect_timeout must be a number of seconds, more than 0, not '5'"),
        ({"credential_provider": "secret"}, "redis: credential_provider must be a redis.CredentialProvider, not str"),
        ({"connection_class": 5}, "redis: connection_class must be a class of redis.asyncio's connections, not 5"),
    ],
)
async def test_a_wrong_argument(arguments: dict[str, Any], message: str) -> None:
    """it is named as soon as the queue is made"""
    for make in (lambda: Queue("q", arguments), lambda: beequeue.sync.Queue("q", arguments)):
        with pytest.raises((TypeError, ValueError)) as caught:
            make()
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prot": 1}, "unexpected keyword argument 'prot'"),
        ({"ssl": True, "ssl_cert_reqs": "what"}, "Requirements Flag: what"),
        ({"ssl": True, "ssl_ciphers": "what"}, "ssl_ciphers 'what': .*[Cc]ipher"),
        ({"ssl": True, "ssl_min_version": "what"}, "ssl_min_version 'what': "),
        ({"ssl": True, "ssl_ca_data": "what"}, "^redis: ssl_ca_data: "),
    ],
)
async def test_an_argument_that_the_driver_refuses(arguments: dict[str, Any], message: str) -> None:
    """it is named at the first connect"""
    queue = Queue("q", {"port": 1, **arguments})
    with pytest.raises(ConnectionRefused, match=message):
        await queue.ready()
    with pytest.raises(ConnectionRefused, match=message):
        await queue.close()


async def slow(attempt: int) -> int:
    return attempt


@pytest.mark.parametrize("wrong", [5, slow])
async def test_a_back_off_of_the_wrong_kind(wrong: Any) -> None:
    with pytest.raises(TypeError, match="^reconnect must be a function from attempt to milliseconds, not "):
        QueueSettings(reconnect=wrong)
    with pytest.raises(TypeError, match="^reconnect must be a function from attempt to milliseconds, not "):
        await beequeue.connect({"port": 1}, reconnect=wrong)


@pytest.mark.parametrize("scheme", ["valkey", "VALKEY"])
async def test_valkey_is_a_scheme(scheme: str) -> None:
    assert str(Address(f"{scheme}://user:{'x'}@h:7/3")) == "h:7/3"
    assert Address("valkeys://h").kind is Address("rediss://h").kind is not Address("valkey://h").kind
    beequeue.check_redis_url(f"{scheme}://h")
    with pytest.raises(ValueError, match="database by a number, not 'redis://h/x'"):
        beequeue.check_redis_url("valkey://h/x")
