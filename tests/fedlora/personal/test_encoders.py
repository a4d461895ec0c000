"""Pretrained encoders as private models: what they compute, what stays untouched, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer, ViTConfig, ViTModel

from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.personal.encoders import EncoderModel
from fedlora.personal.private_models import PrivateModels
from tests.conftest import Compose

ROWS = [0, 1, 2, 3]


def built(federation: Federation) -> PrivateModels:
    module = federation.build_model().module
    assert isinstance(module, PrivateModels)
    return module


def test_features_are_the_projected_mean_over_real_tokens(letters: Compose, tiny_bert: Path) -> None:
    federation = Federation(letters("local_full"))
    module = built(federation)
    model = module.models[tiny_bert.name]
    assert isinstance(model, EncoderModel)
    plain = AutoModel.from_pretrained(tiny_bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with torch.no_grad():
        outputs = module(**federation.task.inputs(federation.task.collate(federation.rows, ROWS)))
        for row, text in enumerate(federation.dataset.rows["text"].iloc[ROWS]):
            hidden = plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            features = model.project(hidden)
            torch.testing.assert_close(outputs.features[row], features, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(outputs.own[row], model.classifier(features), atol=1e-5, rtol=1e-5)


def test_every_tensor_of_the_encoder_is_trained_and_has_a_gradient(letters: Compose) -> None:
    federation = Federation(letters("pfedlora"))
    model = federation.build_model()
    batch = federation.task.collate(federation.rows, ROWS)
    model.own_trainables()
    for name in built(federation).models:
        model.module.current = name  # pyright: ignore
        model.module(**federation.task.inputs(batch)).features.square().sum().backward()
    without = {key for key in model.private if model.module.get_parameter(key).grad is None}
    assert without == {key for key in model.private if ".classifier." in key}


def test_training_leaves_the_next_model_of_the_process_as_the_checkpoint_has_it(
    letters: Compose, tiny_bert: Path
) -> None:
    federation = Federation(letters("local_full", f"backbone.models=[hf:{tiny_bert}]"))
    first = built(federation)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    expected = AutoModel.from_pretrained(tiny_bert).state_dict()
    second = built(federation).models[tiny_bert.name].get_submodule("encoder").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in second.items())


def test_pictures_have_encoders_too(digits: Compose, networks: Path, tmp_path: Path) -> None:
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    vit = ViTModel(config).eval()
    vit.save_pretrained(tmp_path / "vit")
    federation = Federation(
        digits("pfedlora", f"backbone.models=[{networks}:Narrow,hf:{tmp_path}/vit]", "backbone.width=24")
    )
    module = built(federation)
    module.current = "vit"
    pictures = federation.task.collate(federation.rows, ROWS)["pixel_values"]
    with torch.no_grad():
        expected = module.models["vit"].project(vit(pictures).last_hidden_state.mean(1))  # pyright: ignore
        torch.testing.assert_close(module(pictures).features, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=r"'hf:.*vit' does not read pictures of shape \[1, 16, 16\]"):
        Federation(digits("pfedlora", f"backbone.models=[hf:{tmp_path}/vit]", "task.image_size=16")).build_model()


def test_encoders_of_two_widths_need_a_common_one(letters: Compose, tiny_bert: Path, tiny_roberta: Path) -> None:
    models = f"backbone.models=[hf:{tiny_bert},hf:{tiny_roberta}]"
    with pytest.raises(InputError, match=r"have 48 numbers and .* have 32.*set backbone\.width=32"):
        Federation(letters("pfedlora", models)).build_model()
    federation = Federation(letters("pfedlora", models, "backbone.width=32"))
    assert built(federation).width == 32


def test_an_encoder_of_another_vocabulary_is_refused(letters: Compose, tiny_bert: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film"]
    config = BertConfig(vocab_size=7, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(other)
    models = f"backbone.models=[hf:{tiny_bert},hf:{other}]"
    for _ in range(2):  # without a tokenizer of its own, then with one
        with pytest.raises(InputError, match=r"'hf:.*other' has another vocabulary than .*of one vocabulary"):
            Federation(letters("pfedlora", models)).build_meta_model()
        (other / "vocab.txt").write_text("\n".join(words))
        BertTokenizer(str(other / "vocab.txt")).save_pretrained(other)


def test_an_encoder_without_a_tokenizer_takes_that_of_the_others(
    letters: Compose, tiny_bert: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    AutoModel.from_pretrained(tiny_bert).save_pretrained(bare)
    models = f"backbone.models=[hf:{bare},hf:{tiny_bert}]"
    assert len(built(Federation(letters("pfedlora", models, f"backbone.tokenizer={tiny_bert}"))).models) == 2
    with pytest.raises(InputError, match=r"bare' has no tokenizer .*set backbone\.tokenizer"):
        Federation(letters("pfedlora", models)).build_model()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("[hf:GPT2]", r"is of type 'gpt2', which is no encoder of texts"),
        ("[hf:./nowhere]", r"backbone\.models: 'hf:\./nowhere' could not be read.*Give a folder with config\.json"),
        ("[mimilm]", r"names 'mimilm', which is not known\. Did you mean 'minilm'\?.*hf:\./bert-small"),
        ("[hf:BERT,hf:BERT]", r"two models called '.*rename its class or folder"),
        ("[NETS:Narrow]", r"called with \(vocabulary=30522, classes=2\) fails"),
    ],
)
def test_models_of_texts_that_cannot_work_are_refused(
    letters: Compose, tiny_bert: Path, tiny_gpt2: Path, networks: Path, models: str, message: str
) -> None:
    for name, path in {"GPT2": tiny_gpt2, "BERT": tiny_bert, "NETS": networks}.items():
        models = models.replace(name, str(path))
    with pytest.raises(InputError, match=message):
        Federation(letters("pfedlora", f"backbone.models={models}", f"backbone.tokenizer={tiny_bert}")).build_model()


def test_numbers_to_predict_are_refused(letters: Compose, tmp_path: Path) -> None:
    config = letters("local_full").model_copy(update={"task": {"name": "regression"}})
    rows = tmp_path / "numbers.csv"
    rows.write_text("text,label,site\n" + "".join(f"a film,{n},s{n % 4}\n" for n in range(40)))
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(rows)})})
    with pytest.raises(InputError, match=r"predict classes: choose task=classification"):
        Federation(config).build_model()
