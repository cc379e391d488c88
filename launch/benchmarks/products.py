"""The matrix products of a step of distillation, for models of any size."""

from __future__ import annotations

from collections.abc import Sequence

from launch.benchmarks.floor import Product, attention, linear
from launch.benchmarks.options import Shape
from train.models.flops import ModelShape, RelationLayers
from train.objective.build import relation_heads


def products_of(
    student: ModelShape,
    teachers: Sequence[ModelShape],
    shape: Shape,
    *,
    attention_heads: int,
    decoded: int,
    relations: RelationLayers | None = None,
) -> list[Product]:
    """The matrix products of one pass of the teachers and the student over a micro batch, forward and backward.

    Args:
        decoded: positions of a sequence whose logits are needed, of both models.
        relations: for the relations of these layers alone, which need nothing of them but queries, keys and values.
    """
    batch, length = shape
    tokens = batch * length
    products = []
    if relations is not None:
        heads = relation_heads(None, [student.width, *(teacher.width for teacher in teachers)])
        size, maps = student.width // heads, batch * heads
        products += [
            Product(length, size, length, maps, 2 * 3),
            Product(length, length, size, maps, 3),
        ]
        ends = [(student, relations.student, True)]
        ends += [(each, end, False) for each, end in zip(teachers, relations.teachers, strict=True)]
        for model, end, backward in ends:
            products += _layers(model, shape, end - 1, attention_heads, backward)
            products += linear(tokens, model.width, model.width, 3, backward)
        return products
    for model, backward in ((student, True), *((each, False) for each in teachers)):
        products += _layers(model, shape, model.layers, attention_heads, backward)
        products += linear(batch * decoded, model.width, model.embedding, 1, backward)
        products += linear(batch * decoded, model.embedding, model.vocabulary, 1, backward)
    return products


def _layers(
    model: ModelShape, shape: Shape, layers: int, attention_heads: int, backward: bool
) -> list[Product]:
    tokens, width, inner = shape.batch * shape.length, model.width, model.feed_forward
    return [
        *linear(tokens, width, width, 4 * layers, backward),
        *linear(tokens, width, inner, layers, backward),
        *linear(tokens, inner, width, layers, backward),
        *attention(shape.batch * attention_heads, shape.length, width // attention_heads, layers, backward),
    ]
