"""Settings: what is accepted, and the sentence with which everything else is refused."""

import pytest

from agentlab import config
from agentlab.errors import ConfigError


def write(folder, text, name="x.yaml"):
    path = folder / "experiments" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_one_line_is_a_whole_experiment(tmp_path):
    settings = config.load(write(tmp_path, "name: x\n"))
    assert settings.suite == "toolcalls"
    assert settings.lora.rank == 16
    assert settings.population.size == 4


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    settings = config.load(write(tmp_path, "name: x\ntraining: {learning_rate: 5e-4}\nlora: {alpha: 32}\n"))
    assert settings.training.learning_rate == 5e-4
    assert settings.lora.alpha == 32.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\ntrainin: {}\n", ["trainin", "did you mean training?"]),
        ("name: x\ntraining: {stepz: 3}\n", ["training.stepz", "did you mean steps?", "batch_size"]),
        ("name: x\nseed: many\n", ["seed", "'many'", "integer"]),
        ("name: x\nseed: true\n", ["seed", "True"]),
        ("name: x\ntraining: {steps: 2.5}\n", ["training.steps", "2.5"]),
        ("name: x\ntraining: {learning_rate: true}\n", ["training.learning_rate"]),
        ("name: x\ntraining: {learning_rate: .nan}\n", ["training.learning_rate"]),
        ("name: x\ntraining: {learning_rate: -1}\n", ["training.learning_rate", "greater than 0"]),
        ("name: x\nlora: {dropout: 1}\n", ["lora.dropout", "less than 1"]),
        ("name: x\nlora: {target_modules: []}\n", ["lora.target_modules"]),
        ("name: x\npopulation: {size: 2, elites: 2}\n", ["elites: 2", "0 to size - 1 = 1"]),
        ("name: x\npopulation: {pool: 11}\n", ["population.pool", "11", "10"]),
        ("name: x\nmodel: {engine: llama}\n", ["model.engine", "'llama'", "transformers"]),
        ("name: ../evil\n", ["name", "'../evil'"]),
        ("seed: 3\n", ["name is missing"]),
        ("name: x\nname: y\n", ["name", "twice", "line 2"]),
        ("name: [x\n", ["not valid YAML"]),
        ("", ["holds no settings"]),
        ("- a\n", ["holds no settings"]),
        ("name: x\ntraining: 5\n", ["training: 5; allowed: a section with keys method, tokens, steps"]),
        ("name: x\ntraining:\n", ["training: None; allowed: a section with keys method"]),
        ("name: x\ntraining: {learning_rate: abc}\n", ["training.learning_rate: 'abc'; allowed: a number"]),
        ("name: x\n[1, 2]: 3\n", ["key [1, 2] in line 2 is no name; allowed: a text"]),
        ("name: x\n1: 3\n", ["key 1 is no name; allowed: a text"]),
        ("name: 2020-13-45\n", ["not valid YAML", "month must be in 1..12"]),
        ("name: !!timestamp x\n", ["not valid YAML"]),
        ("name: !!bool x\n", ["not valid YAML"]),
        ("name: 2020-12-24\n", ["key name: 2020-12-24; allowed: a text (quote it in YAML)"]),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_file_names_those_that_exist(tmp_path):
    write(tmp_path, "name: x\n")
    with pytest.raises(ConfigError, match=r"no experiment at .*y\.yaml; there are: .*x\.yaml"):
        config.load(tmp_path / "experiments" / "y.yaml")


def test_overrides_win_and_are_checked(tmp_path):
    path = write(tmp_path, "name: x\ntraining: {steps: 3}\n")
    settings = config.load(path, ["training.steps=12", "population.size=2", "lora.target_modules=[q_proj]"])
    assert (settings.training.steps, settings.population.size, settings.lora.target_modules) == (12, 2, ["q_proj"])
    for wrong in ("training.steps", "training.steps=x", "training.steps.more=1", "=3", "nothing.here=1"):
        with pytest.raises(ConfigError):
            config.load(path, [wrong])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training={{x}}", "key {'x': None} in line 1 is no name"),
        ("name=2020-13-45", "'2020-13-45' is not a YAML value"),
        ("lora={rank: 1, rank: 2}", "written twice"),
        ("..=3", "a name between the dots is empty"),
        ("training.=3", "a name between the dots is empty"),
        (".steps=3", "a name between the dots is empty"),
    ],
)
def test_overrides_are_refused_in_one_sentence(tmp_path, override, sentence):
    path = write(tmp_path, "name: x\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path, [override])
    message = str(caught.value)
    assert message.startswith(f"--set {override}: ")
    assert sentence in message
    assert "\n" not in message


def test_a_wrong_value_is_found_where_it_was_written(tmp_path):
    path = write(tmp_path, "name: x\nlora: {rank: no}\nmodel: {rung: nf4}\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path, ["budget.vram_gib=five", "budget.vrm_gib=5", "gate={items: x}"])
    of_set, of_file = str(caught.value).split(f"; in {path}: ")
    assert of_set.startswith("in --set: ")
    assert of_file == "key lora.rank: False; allowed: a valid integer"
    for found in ("budget.vram_gib: 'five'", "budget.vrm_gib; did you mean vram_gib?", "gate.items"):
        assert found in of_set
    with pytest.raises(ConfigError) as caught:  # neither of the two is wrong by itself
        config.load(write(tmp_path, "name: x\nmodel: {rung: nf4}\n"), ["model.engine=vllm"])
    assert str(caught.value).startswith(f"in {path} with --set: key model: ")


def test_a_long_value_is_not_shown_whole(tmp_path):
    with pytest.raises(ConfigError) as caught:
        config.load(write(tmp_path, f"name: {'x' * 100_000}\n"))
    assert len(str(caught.value)) < 600
    assert "… (100,002 characters); allowed: small letters, digits and hyphens" in str(caught.value)


def test_every_setting_changes_the_runs_hash(tmp_path):
    path = write(tmp_path, "name: x\n")
    first = config.load(path)
    assert first.run_hash("suite") == config.load(path).run_hash("suite")
    assert first.run_hash("suite") != first.run_hash("other suite")
    assert first.run_hash("suite") != config.load(path, ["gate.alpha=0.04"]).run_hash("suite")


def test_dumped_settings_are_the_same_run(tmp_path):
    settings = config.load(write(tmp_path, "name: x\ntraining: {learning_rate: 1e-3}\n"))
    again = config.load(write(tmp_path, config.dump(settings), "y.yaml"))
    assert again.run_hash("s") == settings.run_hash("s")


def test_root_is_above_experiments_wherever_one_stands(tmp_path, monkeypatch):
    path = write(tmp_path, "name: x\n")
    monkeypatch.chdir(path.parent)
    assert config.project_root(path) == tmp_path.resolve()
    (tmp_path / "loose.yaml").write_text("name: x\n")
    assert config.project_root(tmp_path / "loose.yaml") == tmp_path.resolve()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.engine=openai"], "base_url: None; allowed with engine openai"),
        (["model.base_url=http://localhost:11434/v1"], "base_url: 'http://localhost:11434/v1'; allowed: null"),
        (["model.engine=openai", "model.base_url=localhost:11434"], "model.base_url"),
        (["model.engine=openai", "model.base_url=http://me:secret@host/v1"], "model.base_url"),
        (["model.engine=openai", "model.base_url=http://h/v1", "model.api_key_env=sk-123"], "model.api_key_env"),
        (["model.engine=cuda"], "model.engine"),
        (
            ["model.engine=vllm", "model.rung=nf4"],
            "rung: 'nf4'; allowed with engine vllm: auto, bf16 on a GPU, fp32 on",
        ),
    ],
)
def test_an_engine_and_its_keys_belong_together(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as error:
        config.load(write(tmp_path, "name: e\n"), overrides)
    assert message in str(error.value)


def test_a_server_is_a_setting(tmp_path):
    server = "engine: openai, base_url: 'http://localhost:11434/v1'"
    path = write(tmp_path, f"name: e\nmodel: {{primary: 'deepseek-r1:7b', {server}}}\n")
    settings = config.load(path)
    assert settings.model.primary == "deepseek-r1:7b"
    assert config.load(write(tmp_path, config.dump(settings), "again.yaml")) == settings
