from pathlib import Path

from agentlab.tracking import Recorder

from .helpers import SUITE, Shown, Story


def copies(model: object) -> set[str]:
    folder = Path(model.artifact_location)  # type: ignore[attr-defined]
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_genealogy_is_in_inputs_outputs_and_tags(shown: Shown) -> None:
    assert set(shown.models) == {"g000-c00", "g000-c01", "g001-c00", "g001-c01"}
    child, run = shown.models["g001-c00"], shown.runs["g001-c00"]
    assert child.source_run_id == run.info.run_id
    assert child.tags["agentlab.parents"] == "g000-c00,g000-c01"
    assert {value.model_id for value in run.inputs.model_inputs} == {
        shown.models["g000-c00"].model_id,
        shown.models["g000-c01"].model_id,
    }
    assert [value.model_id for value in run.outputs.model_outputs] == [child.model_id]
    assert [value.model_id for value in shown.runs["g001-c01"].inputs.model_inputs] == [
        shown.models["g000-c00"].model_id
    ]


def test_models_are_found_by_their_metrics(shown: Shown) -> None:

    def search(where: str) -> set[str]:
        return {model.name for model in shown.client.search_logged_models([shown.experiment_id], where)}

    assert search("metrics.fitness > 0.5") == {"g001-c00"}
    assert search("metrics.fitness >= 0.5 AND params.rank = '4'") == {"g000-c00", "g001-c00", "g001-c01"}
    assert search("tags.`agentlab.state` = 'culled'") == {"g000-c01", "g001-c01"}


def test_culling_removes_the_copies_and_keeps_the_record(finished: Story, shown: Shown) -> None:
    kept = {"adapter_model.safetensors", "card.json"}
    assert {name: copies(model) for name, model in shown.models.items()} == {
        "g000-c00": kept,
        "g000-c01": set(),
        "g001-c00": kept,
        "g001-c01": set(),
    }
    original = finished.run.adapter_folder("g001-c00") / "adapter_model.safetensors"
    copied = Path(shown.models["g001-c00"].artifact_location) / original.name
    assert copied.read_bytes() == original.read_bytes()


def test_weights_are_copied_again_after_a_kill_in_the_middle(story: Story) -> None:
    a, _ = story.begin(0)
    story.train(a)
    story.evaluate(a, 0.5)
    shown = Shown(story.run)
    copy = Path(shown.models[a].artifact_location) / "adapter_model.safetensors"
    copy.write_bytes(b"half")
    shown.client.delete_logged_model_tag(shown.models[a].model_id, "agentlab.weights_sha256")
    recorder = Recorder(story.run, SUITE)
    recorder.reconcile()
    assert recorder.problems == []
    assert copy.read_bytes() == (story.run.adapter_folder(a) / copy.name).read_bytes()
    assert set(Shown(story.run).models) == {a}


def crowned(story: Story) -> tuple[str, str]:
    """The two founders of a finished generation, of which the first is champion."""
    a, b = story.begin(0)
    for adapter, fitness in ((a, 0.5), (b, 0.25)):
        story.train(adapter)
        story.evaluate(adapter, fitness)
    story.finish(0, [a, b], [], champion=a)
    return a, b


def test_the_alias_follows_the_champion(story: Story) -> None:
    a, b = crowned(story)
    client = Shown(story.run).client
    first = client.get_model_version_by_alias("agentlab-tiny", "champion")
    assert (first.version, first.tags["agentlab.adapter_id"]) == (1, a)
    c, d = story.begin(1, [[a, b], [a]])
    for adapter, fitness in ((c, 0.75), (d, 0.5)):
        story.train(adapter)
        story.evaluate(adapter, fitness)
    story.finish(1, [c, a], [b, d], champion=c, incumbent=a)
    shown = Shown(story.run)
    second = client.get_model_version_by_alias("agentlab-tiny", "champion")
    assert (second.version, second.tags["agentlab.adapter_id"]) == (2, c)
    assert second.tags["agentlab.model_id"] == shown.models[c].model_id
    assert Path(second.source) == Path(shown.models[c].artifact_location)
    assert second.run_id == shown.runs[c].info.run_id
    client.set_registered_model_alias("agentlab-tiny", "champion", "1")
    assert story.recorder is not None
    story.recorder.reconcile()
    assert client.get_model_version_by_alias("agentlab-tiny", "champion").version == 2


def test_a_champion_whose_run_was_deleted_gets_one_version_more_and_no_other(story: Story) -> None:
    a, _ = crowned(story)
    shown = Shown(story.run)
    shown.client.delete_run(shown.runs[a].info.run_id)
    for _ in range(3):
        recorder = Recorder(story.run, SUITE)
        recorder.reconcile()
        assert recorder.problems == []
    versions = shown.client.search_model_versions("name = 'agentlab-tiny'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    assert shown.client.get_model_version_by_alias("agentlab-tiny", "champion").version == 2


def test_an_old_run_does_not_take_the_alias_back(story: Story, root: Path) -> None:
    story.two_generations()
    newer = Story(root, seed=8)
    newer.two_generations()
    assert story.recorder is not None
    story.recorder.reconcile()
    client = Shown(story.run).client
    assert client.get_model_version_by_alias("agentlab-tiny", "champion").tags["agentlab.run"] == newer.run.id
    assert len(client.search_model_versions("name = 'agentlab-tiny'")) == 4


def test_without_a_champion_nothing_is_registered(story: Story) -> None:
    a, b = story.begin(0)
    for adapter in (a, b):
        story.train(adapter)
        story.evaluate(adapter, 0.1)
    story.finish(0, [a, b], [], champion="base")
    assert list(Shown(story.run).client.search_registered_models()) == []
