"""Only those who may: loopback unless told otherwise, tokens, TLS and mutual TLS, and secrets that stay secret."""

import hmac
import subprocess

import grpc
import pytest

from tapojax.rpc import client, limits, security
from tapojax.rpc import tapojax_pb2 as pb
from tapojax.rpc import tapojax_pb2_grpc as pb_grpc

TOKEN = security.Security(token="a-long-and-random-word")
CHAINED = security.Security(token="word", certificate=b"-", key=b"-")


def describe(served, identity, **options):
    return served.stub(identity).Describe(pb.DescribeRequest(), timeout=5, **options)


def failure(function, *arguments, **options):
    with pytest.raises(grpc.RpcError) as raised:
        function(*arguments, **options)
    return raised.value


# ---- where a server listens


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_nothing(host):
    security.check_bind(host, security.Security())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.7", "192.168.1.5", "example.com", "127.0.0.1.nip.io"])
@pytest.mark.parametrize(
    "identity, missing",
    [
        (security.Security(), ["--token_file", "--certificate_file", "--key_file"]),
        (security.Security(token="word"), ["--certificate_file", "--key_file"]),
        (security.Security(certificate=b"-", key=b"-"), ["--token_file"]),
    ],
    ids=["nothing", "a token", "a certificate"],
)
def test_a_public_bind_without_credentials_is_refused_and_says_what_to_pass(host, identity, missing):
    with pytest.raises(ValueError) as raised:
        security.check_bind(host, identity)
    message = str(raised.value)
    assert f"--host={host}" in message and "--host=127.0.0.1" in message
    given = {"--token_file", "--certificate_file", "--key_file"} - set(missing)
    assert all(f"{option}=FILE" in message for option in missing) and not any(option in message for option in given)


def test_a_public_bind_with_credentials_is_allowed():
    security.check_bind("0.0.0.0", CHAINED)


def test_a_server_asks_before_it_listens(serve):
    with pytest.raises(ValueError, match="--host=0.0.0.0 .* pass --token_file=FILE"):
        serve(host="0.0.0.0")


# ---- tokens


def test_the_right_token_is_let_in(serve):
    assert describe(serve(identity=TOKEN), TOKEN).task == "lengths"


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", TOKEN.token)],
        [("authorization", f"Bearer {TOKEN.token[:-1]}")],
        [("authorization", f"Bearer {TOKEN.token} ")],
        [("authorization", f"Bearer {TOKEN.token}x")],
        [("authorization", f"bearer {TOKEN.token.upper()}")],
        [("token", TOKEN.token)],
        [("authorization", f"Bearer {TOKEN.token}"), ("authorization", "Bearer other")],
    ],
    ids=["none", "empty", "bare", "short", "space", "long", "case", "elsewhere", "two"],
)
def test_a_missing_or_wrong_token_is_unauthenticated_for_every_method(serve, metadata):
    served = serve(identity=TOKEN)
    channel = served.channel()
    rollouts, rewards = pb_grpc.RolloutsStub(channel), pb_grpc.RewardsStub(channel)
    calls = [
        lambda **options: rewards.Describe(pb.DescribeRequest(), **options),
        lambda **options: list(rewards.Score(iter([pb.ScoreItem()]), **options)),
        lambda **options: list(rollouts.Generate(pb.GenerateRequest(), **options)),
        lambda **options: rollouts.LoadWeights(iter([pb.WeightsChunk()]), **options),
    ]
    for call in calls:
        error = failure(call, timeout=5, metadata=metadata)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED, error.details()
        assert "--token_file" in error.details() and TOKEN.token not in error.details()


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(given, expected):
        compared.append((given, expected))
        return hmac.compare_digest(given, expected)

    monkeypatch.setattr(security, "hmac", type("Spy", (), {"compare_digest": staticmethod(compare)}))
    assert security.authorized([("authorization", "Bearer abc")], "abc")
    assert not security.authorized([("authorization", "Bearer abd")], "abc")
    assert not security.authorized([("authorization", "Bearer \xe9")], "abc"), "no error for what is not ASCII"
    assert not security.authorized([("authorization", b"\xff")], "abc")
    assert len(compared) == 4 and all(expected == b"Bearer abc" for _, expected in compared)


# ---- TLS


def tls(folder, name, **others):
    files = {"certificate_file": f"{folder}/{name}.pem", "key_file": f"{folder}/{name}.key"} if name else {}
    return security.load_security(**files, **others)


def test_tls_with_a_token_serves_those_who_know_the_authority(serve, certificates, tmp_path):
    (tmp_path / "token").write_text("a-word\n")
    served = serve(identity=tls(certificates, "server", token_file=str(tmp_path / "token")))
    knows = security.load_security(
        token_file=str(tmp_path / "token"), authority_file=str(certificates / "authority.pem")
    )
    assert describe(served, knows).task == "lengths"
    assert failure(describe, served, knows._replace(token=None)).code() is grpc.StatusCode.UNAUTHENTICATED
    stranger = knows._replace(authority=(certificates / "stranger.pem").read_bytes())
    assert failure(describe, served, stranger).code() is grpc.StatusCode.UNAVAILABLE
    plain = security.Security(token="a-word")
    assert failure(describe, served, plain).code() is grpc.StatusCode.UNAVAILABLE


def test_mutual_tls_serves_only_those_the_authority_signed(serve, certificates):
    authority = str(certificates / "authority.pem")
    served = serve(identity=tls(certificates, "server", authority_file=authority))
    assert describe(served, tls(certificates, "client", authority_file=authority)).task == "lengths"
    for identity in [
        tls(certificates, "", authority_file=authority),
        tls(certificates, "stranger", authority_file=authority),
    ]:
        assert failure(describe, served, identity).code() is grpc.StatusCode.UNAVAILABLE


def test_a_public_server_with_all_of_it_answers(serve, certificates):
    identity = tls(certificates, "server")._replace(token="a-word")
    served = serve(identity=identity, host="0.0.0.0")
    knows = security.Security(token="a-word", authority=(certificates / "authority.pem").read_bytes())
    channel = client.channel(f"localhost:{served.running.port}", security=knows, limits=limits.Limits())
    assert pb_grpc.RewardsStub(channel).Describe(pb.DescribeRequest(), timeout=5).task == "lengths"


# ---- half of a pair is an error, not a weaker wire


def test_an_authority_alone_makes_no_server():
    with pytest.raises(ValueError, match="--certificate_file and --key_file"):
        security.server_credentials(security.Security(authority=b"-"))


def test_a_certificate_alone_makes_no_client():
    with pytest.raises(ValueError, match="--authority_file"):
        security.channel_credentials(security.Security(certificate=b"-", key=b"-"))


# ---- secrets come from files


def test_what_is_loaded_is_what_the_files_hold(certificates, tmp_path):
    (tmp_path / "token").write_text("  spaces-around\n")
    loaded = tls(
        certificates,
        "client",
        token_file=str(tmp_path / "token"),
        authority_file=str(certificates / "authority.pem"),
    )
    names = ["client.pem", "client.key", "authority.pem"]
    assert loaded == security.Security("spaces-around", *[(certificates / name).read_bytes() for name in names])
    assert security.load_security() == security.Security()


@pytest.mark.parametrize("option", ["token_file", "certificate_file", "key_file", "authority_file"])
def test_a_file_that_cannot_be_read_is_named(option, tmp_path):
    with pytest.raises(ValueError, match=f"--{option}=.*absent cannot be read: No such file"):
        security.load_security(**{option: str(tmp_path / "absent")})
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match=f"--{option}=.*empty is empty"):
        security.load_security(**{option: str(tmp_path / "empty")})


@pytest.mark.parametrize("content", [b"two words", b"caf\xc3\xa9", b"\xff\xfe", b"line\nline"])
def test_a_token_is_one_word_of_ascii(content, tmp_path):
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ValueError, match="token must hold one word of printable ASCII"):
        security.load_security(token_file=str(tmp_path / "token"))


def test_certificates_are_checked_when_they_are_loaded(certificates, tmp_path):
    paths = {name: str(certificates / name) for name in ("server.pem", "server.key", "client.key")}
    (tmp_path / "noise").write_text("noise")
    noise = str(tmp_path / "noise")
    with pytest.raises(ValueError, match="give both or neither"):
        security.load_security(certificate_file=paths["server.pem"])
    with pytest.raises(ValueError, match="server.pem and .*client.key are not a certificate and its"):
        security.load_security(certificate_file=paths["server.pem"], key_file=paths["client.key"])
    with pytest.raises(ValueError, match="noise and .*server.key are not a certificate"):
        security.load_security(certificate_file=noise, key_file=paths["server.key"])
    with pytest.raises(ValueError, match="noise is not a certificate in PEM"):
        security.load_security(authority_file=noise)


def test_a_key_under_a_password_is_refused_without_a_prompt(certificates, tmp_path):
    sealed = tmp_path / "sealed.key"
    subprocess.run(
        ["openssl", "ec", "-in", "server.key", "-aes256", "-passout", "pass:word", "-out", sealed],
        cwd=certificates,
        check=True,
        capture_output=True,
    )
    with pytest.raises(ValueError, match="unencrypted key"):
        security.load_security(certificate_file=str(certificates / "server.pem"), key_file=str(sealed))


def test_a_printed_identity_gives_nothing_away():
    printed = f"{CHAINED} {CHAINED!r} {[CHAINED]}"
    assert "word" not in printed and "token" in printed and "certificate" in printed
    assert repr(security.Security()) == "Security()"
