"""Questions of one to three hops over the world's facts, each with one answer that searches can reach.

Held out are countries, with all that lies in them, and paths: combinations of relations that training only
meets in other combinations.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass, replace

from ...tools.search import SearchIndex, SearchTool
from ..rewards import normalize_answer
from .facts import PHRASES, RELATIONS, Entity, Fact, Relation, World, fold
from .questions import Question

TOP_K, SNIPPET_CHARS = 3, 160  # within which every hop's value is found and read
PER_COUNTRY = {"train": {1: 6, 2: 2, 3: 4}, "heldout": {1: 16, 2: 6, 3: 12}}  # questions of one path, by hops
MAX_PER_PATH = {"train": 800, "heldout": 250}

Chain = tuple[Relation, ...]


def paths() -> list[Chain]:
    """Every chain of up to three relations that visits no kind of thing twice."""
    chains: list[Chain] = [(relation,) for relation in RELATIONS]
    for chain in chains:  # the list grows meanwhile
        visited = {relation.source for relation in chain} | {chain[-1].target}
        chains += [
            (*chain, relation)
            for relation in RELATIONS
            if relation.source == chain[-1].target
            and relation.target not in visited
            and not _mirrors(chain[0], relation)
        ]
    return chains


def _mirrors(first: Relation, last: Relation) -> bool:
    """Whether the question would ask for what it names, as in the capital of the country whose capital is Oslo."""
    return first.source == last.name.partition(".")[2]


def new_paths() -> frozenset[Chain]:
    """About a quarter of the paths, for held-out questions only; their relations all occur in other paths."""
    position = {relation: i for i, relation in enumerate(RELATIONS)}
    longer = {relation for path in paths() if len(path) > 1 for relation in path}
    return frozenset(p for p in paths() if longer.issuperset(p) and sum(map(position.__getitem__, p)) % 4 == 1)


def compose(world: World, index: SearchIndex) -> list[Question]:
    """All questions, in the order of a hash: the same for the same world."""
    composer = _Composer(world, index)
    questions = [question for path in paths() for split in PER_COUNTRY for question in composer.questions(path, split)]
    return _balanced(sorted(questions, key=lambda question: _hash(question.id)))


@dataclass(frozen=True, slots=True)
class _Hop:
    """One step of a path: which relation of what, and the value."""

    relation: Relation
    source: Entity
    mention: str  # the source as the passage before wrote it
    fact: Fact

    @property
    def query(self) -> str:
        return self.relation.query.format(self.mention)


class _Composer:
    """Follows paths through the facts and keeps what a search can follow too."""

    def __init__(self, world: World, index: SearchIndex) -> None:
        self.world = world
        self.tool = SearchTool(index, TOP_K, SNIPPET_CHARS)
        self.new_paths = new_paths()
        entities = {source for facts in world.facts.values() for source in facts}
        self.namesakes = Counter((entity.kind, fold(entity.name)) for entity in entities)

    def questions(self, path: Chain, split: str) -> list[Question]:
        """The path's questions for a split: at most PER_COUNTRY for each country, and MAX_PER_PATH in all."""
        if split == "train" and path in self.new_paths:
            return []
        counts: Counter[str] = Counter()
        questions: list[Question] = []
        for source in self.sources(path[0], split):
            place = source.country or source.key
            wanted = counts[place] < PER_COUNTRY[split][len(path)] and len(questions) < MAX_PER_PATH[split]
            if wanted and (hops := self.hops(path, source, split)):
                questions.append(self.question(hops, split))
                counts[place] += 1
        return questions

    @functools.cache  # noqa: B019  (a composer lives as long as the composition)
    def sources(self, relation: Relation, split: str) -> list[Entity]:
        """What a question can start from: entities whose name says which is meant."""
        within = (entity for entity in self.world.facts[relation.name] if self.split(entity) == split)
        named = (entity for entity in within if self.namesakes[entity.kind, fold(entity.name)] == 1)
        plain = (entity for entity in named if entity.kind != "language" or entity.name.isalpha())
        return sorted(plain, key=lambda entity: _hash(f"{entity.kind} {entity.key}"))

    def hops(self, path: Chain, source: Entity, split: str) -> list[_Hop] | None:
        """The steps from the source, or None if one is missing, lies outside the split or cannot be searched for."""
        hops: list[_Hop] = []
        entity: Entity | None = source
        for relation in path:
            fact = self.world.facts[relation.name].get(entity) if entity else None
            if entity is None or fact is None or self.split(entity) != split:
                return None
            hops.append(_Hop(relation, entity, hops[-1].fact.answers[0] if hops else entity.name, fact))
            entity = fact.target
        return hops if all(map(self.can_find, hops)) else None

    def question(self, hops: list[_Hop], split: str) -> Question:
        first, last = hops[0], hops[-1]
        path = "/".join(hop.relation.name for hop in hops)
        spoken = PHRASES.get(first.source.kind, "{}").format(first.source.name)
        for hop in hops[:-1]:
            spoken = hop.relation.noun.format(spoken)
        question = Question(
            id=_hash(f"{path} {first.source.key}").hex()[:12],
            question=last.relation.question.format(spoken),
            answers=last.fact.answers,
            supporting=tuple(hop.fact.passage for hop in hops),
            queries=tuple(hop.query for hop in hops),
            hops=len(hops),
            split=split,
            path=path,
            new_path=tuple(hop.relation for hop in hops) in self.new_paths,
        )
        wrong = self.wrong_relation(last)
        return replace(
            question,
            wrong_query=wrong.query if wrong else "",
            wrong_answer=wrong.fact.answers[0] if wrong else "",
            guess=self.guess(question, last.relation),
        )

    @functools.cache  # noqa: B019
    def split(self, entity: Entity) -> str:
        """The split of an entity is its country's; one that several countries have is held out if all of them are."""
        places = [entity.country] if entity.country else self.world.holders.get(entity, {entity.key})
        return "heldout" if all(_hash(place)[0] % 4 == 0 for place in places) else "train"

    def can_find(self, hop: _Hop) -> bool:
        """Whether the hop's search shows its passage, and the passage's snippet the value."""
        hits = self.hits(hop.query)
        return hop.fact.passage in hits and hop.fact.answers[0] in hits[hop.fact.passage]

    @functools.cache  # noqa: B019
    def hits(self, query: str) -> dict[str, str]:
        """The snippets that the search shows, by passage."""
        hits = self.tool.index.search(query, TOP_K)
        return {hit.passage.id: self.tool.snippet(hit.passage) for hit in hits}

    def wrong_relation(self, hop: _Hop) -> _Hop | None:
        """Another fact about the same thing, with another value."""
        right = set(map(normalize_answer, hop.fact.answers))
        others = [
            _Hop(relation, hop.source, hop.mention, self.world.facts[relation.name][hop.source])
            for relation in RELATIONS
            if relation.query != hop.relation.query and hop.source in self.world.facts[relation.name]
        ]
        wrong = [other for other in others if right.isdisjoint(map(normalize_answer, other.fact.answers))]
        return min(wrong, key=lambda other: _hash(f"{hop.query} {other.query}"), default=None)

    def guess(self, question: Question, relation: Relation) -> str:
        """The same relation's value elsewhere in the split."""
        right = set(map(normalize_answer, question.answers))
        values = self.all_values(relation, question.split)
        start = int.from_bytes(_hash(question.id)[:4]) % len(values)
        return next((value for value in values[start:] + values[:start] if normalize_answer(value) not in right), "")

    @functools.cache  # noqa: B019
    def all_values(self, relation: Relation, split: str) -> list[str]:
        facts = self.world.facts[relation.name].items()
        return sorted({fact.answers[0] for source, fact in facts if self.split(source) == split})


def _balanced(questions: list[Question]) -> list[Question]:
    """As many held-out questions on new paths as on seen ones, for each hop count."""
    groups: dict[tuple[int, bool], list[Question]] = {}
    for question in questions:
        if question.split == "heldout":
            groups.setdefault((question.hops, question.new_path), []).append(question)
    size = {hops: min(len(groups[hops, False]), len(groups[hops, True])) for hops in {hops for hops, _ in groups}}
    kept = {question.id for (hops, _), group in groups.items() for question in group[: size[hops]]}
    return [question for question in questions if question.split == "train" or question.id in kept]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
