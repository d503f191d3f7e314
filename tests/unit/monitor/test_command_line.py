"""What a command line shows of itself, and what it does not."""

import shlex
import time

import pytest

from dsft.monitor.command_line import MAX_CHARS, clean_text, describe_command
from dsft.monitor.secret_names import is_secret_name

HF = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH"
HEX_40 = "0123456789abcdef0123456789abcdef01234567"
JWT = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"

RANDOM = ("a8Kd92mXq0Lz71Bv", "0123abcd4567ef890123abcd", "qwertzuiopasdfghjklyxcv")

SECRETS = [
    # command line as a shell would split it, the secret in it
    ("train.py --token hunter22", "hunter22"),
    ("train.py --token=hunter22", "hunter22"),
    ("train.py -token hunter22", "hunter22"),
    ("train.py --hf-token hunter22 --lr 1", "hunter22"),
    ("train.py --hf_token=hunter22", "hunter22"),
    ("train.py --hub-token 'two words'", "two words"),
    ("train.py --use-auth-token hunter22", "hunter22"),
    ("train.py --token -hunter22", "-hunter22"),
    ("train.py --token2 hunter22", "hunter22"),
    ("train.py --token-value hunter22", "hunter22"),
    ("train.py --password 'a b;c&d'", "a b;c&d"),
    ("train.py --password='a b;c&d'", "a b;c&d"),
    ("train.py --db-pwd hunter22", "hunter22"),
    ("train.py --passphrase 'correct horse'", "horse"),
    ("train.py --api-key hunter22", "hunter22"),
    ("train.py --apikey hunter22", "hunter22"),
    ("train.py --apiKey hunter22", "hunter22"),
    ("train.py --wandb-key hunter22", "hunter22"),
    ("train.py --openai_api_key=hunter22", "hunter22"),
    ("train.py --aws-secret-access-key hunter22", "hunter22"),
    ("train.py --client-secret hunter22", "hunter22"),
    ("train.py --credentials hunter22", "hunter22"),
    ("train.py --auth user:hunter22", "hunter22"),
    ("train.py --basic-auth user:hunter22", "hunter22"),
    ("train.py hub.token=hunter22", "hunter22"),
    ("train.py +logger.wandb.api_key=hunter22", "hunter22"),
    ("train.py ++a.password='hunter 22'", "22"),
    ("train.py --set auth.token=hunter22", "hunter22"),
    ("train.py --env=HF_TOKEN=hunter22", "hunter22"),
    ("env HF_TOKEN=hunter22 python train.py", "hunter22"),
    ("env WANDB_API_KEY=" + HEX_40 + " python train.py", HEX_40),
    ("docker run -e HF_TOKEN=hunter22 image", "hunter22"),
    ("docker run -eHF_TOKEN=hunter22 image", "hunter22"),
    ("docker login -u me -p hunter22", "hunter22"),
    ("aws configure set aws_secret_access_key hunter22", "hunter22"),
    ("wandb login " + HEX_40, HEX_40),
    ("wandb login --relogin " + HEX_40, HEX_40),
    ("sshpass -p hunter22 ssh host", "hunter22"),
    ("sshpass -phunter22 ssh host", "hunter22"),
    ("mysql -u root -phunter22 base", "hunter22"),
    ("redis-cli -a hunter22 ping", "hunter22"),
    ("curl -u me:hunter22 https://host", "hunter22"),
    ("curl --user me:hunter22 https://host", "hunter22"),
    ("curl -H 'Authorization: Bearer hunter22-long' https://host", "hunter22"),
    ("curl -H 'Authorization: Basic aHVudGVyMjI=' https://host", "aHVudGVyMjI"),
    ("curl -H 'authorization: token hunter22' https://host", "hunter22"),
    ("curl -H 'Authorization: Digest username=me, response=hunter22' https://host", "hunter22"),
    ("curl -H 'X-Api-Key: hunter22' https://host", "hunter22"),
    ("curl -H 'PRIVATE-TOKEN: hunter22' https://host", "hunter22"),
    ("curl -H 'Cookie: session=hunter22; other=hunter23' https://host", "hunter23"),
    ("""curl -d '{"api_key": "hunter22", "n": 1}' https://host""", "hunter22"),
    ("""curl -d '{"password":"hunter 22"}' https://host""", "22"),
    (r"""curl -d '{\"password\": \"hunter 22\"}' https://host""", "22"),
    ("git clone https://me:hunter22@host/x.git", "hunter22"),
    ("git clone https://me:hun@ter22@host/x.git", "ter22"),
    ("git clone https://me:hun/ter22@host/x.git", "ter22"),
    ("git clone https://0123456789abcdef0123456789abcdef@host/5", "0123456789abcdef"),
    ("serve.py postgresql+asyncpg://me:hunter22@host:5432/base", "hunter22"),
    ("serve.py redis://:hunter22@host:6379/0", "hunter22"),
    ("serve.py --db=postgres://me:hunter22@host/base", "hunter22"),
    ("wget 'https://host/x?token=hunter22&page=2'", "hunter22"),
    ("wget 'https://host/x?a=1&access_token=hunter22'", "hunter22"),
    ("wget 'https://host/x?sv=2020&sig=hunter22%3D'", "hunter22"),
    ("wget 'https://host/x?key=hunter22'", "hunter22"),
    ("wget 'https://host/x?X-Amz-Signature=0123abcd&X-Amz-Expires=3'", "0123abcd"),
    ("bash -c 'export HF_TOKEN=hunter22; python train.py'", "hunter22"),
    ("""bash -c 'HF_TOKEN="hunter 22" python train.py'""", "22"),
    ("""bash -c "PASSWORD='hunter 22'tail python train.py" """, "tail"),
    ("bash -lc 'python train.py --token hunter22 --lr 1'", "hunter22"),
    ("bash -c 'curl -u me:hunter22 host'", "hunter22"),
    ("bash -c 'sshpass -p hunter22 ssh host'", "hunter22"),
    ("bash -c 'mysql -u root -phunter22 base'", "hunter22"),
    ("ssh host 'HF_TOKEN=hunter22 python train.py'", "hunter22"),
    ("bash -c 'A=1\nB_SECRET=hunter22\npython x'", "hunter22"),
    ("""python -c 'os.environ["HF_TOKEN"] = "hunter22"' """, "hunter22"),
    ("openssl rsa -passin pass:hunter22", "hunter22"),
    ("env PGPASSWORD=hunter22 psql", "hunter22"),
    ("bash -c 'export PGPASSWORD=hunter22; psql'", "hunter22"),
    ("env SSHPASS=hunter22 sshpass -e ssh host", "hunter22"),
    ("env HFTOKEN=hunter22 python x", "hunter22"),
    ("env KAGGLE_KEY=hunter22 python x", "hunter22"),
    ("env API_TOKEN='two words' python x", "words"),
    ("docker run -e HF_TOKEN='two words' image", "words"),
    ("train.py --hftoken hunter22", "hunter22"),
    ("train.py --accesstoken hunter22", "hunter22"),
    ("train.py --secretkey hunter22", "hunter22"),
    ("train.py --accesskey=hunter22", "hunter22"),
    ("train.py --wandbkey hunter22", "hunter22"),
    ("train.py --dbpass hunter22", "hunter22"),
    ("train.py --dbpassword hunter22", "hunter22"),
    ("java -Dpassword=hunter22 -jar x.jar", "hunter22"),
    ("java -Dapi.key=hunter22 -jar x.jar", "hunter22"),
    ("java -Djavax.net.ssl.keyStorePassword=hunter22 -jar x.jar", "hunter22"),
    ("x --pwd hunter22", "hunter22"),
    ("x 'Server=host;Pwd=hunter22;Database=b'", "hunter22"),
    ("x --pass-phrase hunter22", "hunter22"),
    ("x --apikeys hunter22,hunter23", "hunter23"),
    ("x --hf_token_read hunter22", "hunter22"),
    ("x --otp 123456", "123456"),
    ("x --pin 4711", "4711"),
    ("x --license-key hunter22", "hunter22"),
    ("x --deepseek-key hunter22", "hunter22"),
    ("x --cohere-key hunter22", "hunter22"),
    ("x --together_key hunter22", "hunter22"),
    ("curl --user=me:hunter22 https://host", "hunter22"),
    ("curl -ume:hunter22 https://host", "hunter22"),
    ("curl -u me:12345 https://host", "12345"),
    ("bash -c 'curl --user=me:hunter22 host'", "hunter22"),
    ("bash -c 'curl -ume:hunter22 host'", "hunter22"),
    *((f"x --{kind}-token {word}", word) for kind in ("chat", "new", "start", "vision", "tool") for word in RANDOM),
    ("curl https://hooks.slack.com/services/T0AAAA/B0BBBB/cccccccccccc", "cccccccccccc"),
    ("curl https://discord.com/api/webhooks/123/hunter22", "hunter22"),
    ("git clone https://hunter22@host/x.git", "hunter22"),
    ("train.py --token --hunter22", "hunter22"),
    ("train.py --token --x7Kq9-aB3", "x7Kq9"),
    ("train.py --token --0a1b2c3d4e5f6a7b8c9d", "0a1b2c"),
    ("train.py --token=--hunt --lr 1", "hunt"),
    (f"python train.py {HF}", HF),
    (f"python train.py --model=x:{HF}", HF),
    (f"python train.py --note 'see {HF}.'", HF),
    ("x sk-proj-abcdefghij0123456789ABCDEFGHIJ", "abcdefghij0123456789"),
    ("x sk-ant-api03-abcdefghij0123456789", "abcdefghij0123456789"),
    ("x ghp_0123456789abcdefghij0123456789abcdef", "0123456789"),
    ("x gho_0123456789abcdefghij0123456789abcdef", "0123456789"),
    ("x github_pat_11ABCDEFG0123456789_abcdefgh", "0123456789"),
    ("x glpat-0123456789abcdefghij", "0123456789"),
    ("x xoxb-0123456789-0123456789-abcdef", "0123456789"),
    ("x AKIAIOSFODNN7EXAMPLE", "IOSFODNN7EXAMPLE"),
    ("x AIzaSyA0123456789abcdefghijABCDEFGHIJKLM", "0123456789"),
    (f"x {JWT}", JWT.split(".")[2]),
    ("x '-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----'", "MIIEow"),
]

HARMLESS = [
    "train.py --max-tokens 512",
    "train.py --max_new_tokens=512",
    "train.py --tokenizer /models/tokenizer",
    "train.py --tokenizer-mode auto",
    "train.py --num-tokens 1000000",
    "train.py --pad-token-id 32014",
    "train.py --pad-token <pad>",
    "train.py --eos-token <|EOT|>",
    "train.py --additional-special-tokens a b",
    "train.py --cost-per-token 12.5",
    "train.py --token-budget 4096",
    "train.py --token-type-ids a.npy",
    "train.py --token-file /run/token",
    "train.py --password-file /run/password",
    "train.py --auth-type basic",
    "train.py --no-auth host",
    "train.py --use_auth_token=True",
    "train.py --use_auth_token --bf16",
    "train.py --author someone",
    "train.py --authority host",
    "train.py --chat-token <|chat|> --start-token <|im_start|> --new-token word",
    "train.py --bostoken <s> --maxtokens 2048 --numtokens 12",
    "train.py --pad-token-id 0 --token 512 --pass-key 8",
    "train.py --key-value 12 --key-size 64 --num-key-value-heads 8 --kv-key true",
    "train.py --bypass x --compass y --pin-memory true --hotkey ctrl-alt-p",
    "train.py --use_auth_token --use-flash-attention-2 --load-in-4bit --adam-beta1=0.9",
    "java -Dfile.encoding=UTF-8 -url=https://host/a -jar x.jar",
    "train.py --sort-key length",
    "train.py --text-key text --image-key image",
    "train.py --keys a,b",
    "train.py --passes 12",
    "train.py --pass 2",
    "train.py --secretary x",
    "train.py --compass north",
    "train.py tokens.bin token secrets.txt",
    "train.py --lr 2e-4 --revision " + HEX_40,
    "train.py model.max_tokens=512",
    "train.py --model deepseek-ai/deepseek-coder-6.7b-base --port 8000:8000",
    "docker run --user 1000:1000 image",
    "env PWD=/home/me OLDPWD=/home python x.py",
    "wget https://host:8080/a@b?page=2&tokens=5",
    "git clone ssh://git@host/x.git",
    "git clone git@host:me/x.git",
    "serve.py http://host:8080/v1 http://[::1]:80/",
    "python -m hf_transfer_something --sk-learn yes",
    "python -c 'tokenizer = load(x); max_tokens = 12'",
    "bash -c 'echo $HF_TOKEN; python train.py --token $HF_TOKEN --key ${KEY}'",
    'curl -d \'{"max_tokens": 512, "model": "sk-learn"}\' https://host',
    "x a::token::b",
    "mysql -u root -h host -P 3306 base",
]


@pytest.mark.parametrize(("line", "secret"), SECRETS)
def test_a_secret_is_masked(line: str, secret: str) -> None:
    shown = describe_command(shlex.split(line))

    assert secret not in shown
    assert "***" in shown


@pytest.mark.parametrize("line", HARMLESS)
def test_what_is_no_secret_stays(line: str) -> None:
    assert describe_command(shlex.split(line)) == " ".join(shlex.split(line))


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/usr/bin/python3 train.py --token x9 --lr 1", "python3 train.py --token *** --lr 1"),
        ("curl -u me:x9 'https://me:x9@host/a?token=x9&b=2'", "curl -u me:*** https://me:***@host/a?token=***&b=2"),
        (
            "bash -c 'HF_TOKEN=x9 python train.py --api-key=x9 && ls'",
            "bash -c HF_TOKEN=*** python train.py --api-key=*** && ls",
        ),
        ("env A_TOKEN=x9 B=2 python", "env A_TOKEN=*** B=2 python"),
        ("mysql -px9 base", "mysql -p*** base"),
    ],
)
def test_only_the_secret_goes(line: str, shown: str) -> None:
    assert describe_command(shlex.split(line)) == shown


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["/opt/venv/bin/python3", "-u", "x.py"], "python3 -u x.py"),
        (["/opt/my programs/bin/python3", "x.py"], "python3 x.py"),
        (["-bash"], "-bash"),
        (["VLLM::EngineCore"], "VLLM::EngineCore"),
        (["nginx: master process /usr/sbin/nginx"], "nginx: master process /usr/sbin/nginx"),
        (["/usr/sbin/apache2 -k start --token x9"], "apache2 -k start --token ***"),
        (["ray::work --token=x9"], "ray::work --token=***"),
        ([""], ""),
        ([], ""),
        (["x", "", "y"], "x  y"),
    ],
)
def test_the_program_is_named_without_its_folder(arguments: list[str], shown: str) -> None:
    assert describe_command(arguments) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a?[31mb"),
        ("a\x1b]0;title\x07b", "a?]0;title?b"),
        ("a\nb\tc\r\nd", "a b c d"),
        ("a\x9b31mb\x00", "a?31mb?"),
        ("a\u202eb\u200bc", "a?b?c"),
        ("näive — ok ✓", "näive — ok ✓"),
    ],
)
def test_nothing_that_a_terminal_obeys_is_left(text: str, shown: str) -> None:
    assert clean_text(text) == shown
    assert describe_command(["x", text]) == f"x {shown}"


def test_a_long_command_is_cut_after_it_was_masked() -> None:
    shown = describe_command(["x", "a" * (MAX_CHARS - 10), "--token", "hunter22" * 10])

    assert len(shown) <= MAX_CHARS
    assert "hunter" not in shown

    assert len(describe_command(["x", *["abc"] * MAX_CHARS])) > MAX_CHARS - 9


@pytest.mark.parametrize("place", range(MAX_CHARS - 60, MAX_CHARS + 5))
@pytest.mark.parametrize("secret", [HF, f"https://me:{HEX_40}@host/x", f"a={HF}"])
def test_a_secret_that_is_cut_in_the_middle_is_not_shown(place: int, secret: str) -> None:
    shown = describe_command(["x", "a" * (place - 3), secret, "b" * 100])

    assert shown.endswith("…")
    assert "hf_" not in shown
    assert HEX_40[:3] not in shown


@pytest.mark.parametrize("argument", ["a=" * 8000, "--a=" * 4000, "a:" * 8000, "[" * 16_000, "$(" * 8000])
def test_no_argument_is_too_deep(argument: str) -> None:
    assert describe_command(["x", argument, "y"]).startswith("x")


@pytest.mark.parametrize(
    "filling",
    [
        "a", "a=", "--a ", "a:", '"', "'", "\\", "http://a:", "http://a:b@", "http://", "=", "token=", "--token ", "-",
        "a.", "eyJ", "eyJ-", "sk-", "hf_", "SG.", "xox", "mysql ", "mysql -p", "sshpass ", "login ", "login -p", "-u ",
        "-ua", "-u a:", "authorization ", "cookie:", "bearer ", "?key=", "-----BEGIN ", "a_", "a.b_key ", '\\"',
        "{'a_key': ",
    ],
)  # fmt: skip
@pytest.mark.parametrize("separator", ["", " "])
def test_no_text_takes_long(filling: str, separator: str) -> None:
    text = (filling + separator) * 16_384
    for arguments in (
        ["x", text[:16_384]],
        ["bash", "-c", text[:16_384]],
        [text[:16_384]],
        ["x", *text[:16_384].split()],
    ):
        assert _least_time_s(arguments) < 0.02


@pytest.mark.parametrize(
    "text", ["sk-" * 5333, "authorization" + " " * 16_000, " " * 16_000 + "authorization", "a=" * 8000]
)
def test_what_took_long_once_takes_no_time(text: str) -> None:
    assert _least_time_s(["x", text]) < 0.02


def _least_time_s(arguments: list[str]) -> float:
    times = []
    for _ in range(3):  # another process may take the processor's caches meanwhile
        started_s = time.process_time()
        describe_command(arguments)
        times.append(time.process_time() - started_s)
    return min(times)


@pytest.mark.parametrize(
    "name", ["token", "HF_TOKEN", "--hub-token", "apiKey", "api_key", "x.y.password", "Private-Token"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["tokens", "tokenizer", "pad_token", "token_id", "key", "PWD", "no-token", "", "--", "12"]
)
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)
