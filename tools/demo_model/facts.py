"""What the demo model knows: world facts and the word lists its chats are made of, written for this project."""

# ruff: noqa: SIM905 - word lists read better as text than as quoted lists

from __future__ import annotations

_BY_CONTINENT = {
    "Europe": """France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Poland:Warsaw Austria:Vienna
        Hungary:Budapest Greece:Athens Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen
        Ireland:Dublin Belgium:Brussels Netherlands:Amsterdam Switzerland:Bern Czechia:Prague Slovakia:Bratislava
        Slovenia:Ljubljana Croatia:Zagreb Serbia:Belgrade Romania:Bucharest Bulgaria:Sofia Ukraine:Kyiv Russia:Moscow
        Iceland:Reykjavik Estonia:Tallinn Latvia:Riga Lithuania:Vilnius Albania:Tirana Malta:Valletta
        Moldova:Chisinau Belarus:Minsk Monaco:Monaco_City England:London Scotland:Edinburgh Wales:Cardiff
        Bosnia:Sarajevo Montenegro:Podgorica Kosovo:Pristina""",
    "Asia": """Japan:Tokyo China:Beijing India:New_Delhi Nepal:Kathmandu Thailand:Bangkok Vietnam:Hanoi
        Indonesia:Jakarta Philippines:Manila Malaysia:Kuala_Lumpur Iran:Tehran Iraq:Baghdad Syria:Damascus
        Lebanon:Beirut Jordan:Amman Qatar:Doha Mongolia:Ulaanbaatar Turkey:Ankara Pakistan:Islamabad Bangladesh:Dhaka
        Bhutan:Thimphu Laos:Vientiane Cambodia:Phnom_Penh South_Korea:Seoul North_Korea:Pyongyang Georgia:Tbilisi
        Armenia:Yerevan Azerbaijan:Baku Oman:Muscat Yemen:Sanaa Kuwait:Kuwait_City Saudi_Arabia:Riyadh
        Afghanistan:Kabul Uzbekistan:Tashkent Kazakhstan:Astana Cyprus:Nicosia Maldives:Male""",
    "Africa": """Egypt:Cairo Morocco:Rabat Algeria:Algiers Tunisia:Tunis Kenya:Nairobi Ethiopia:Addis_Ababa
        Ghana:Accra Nigeria:Abuja Senegal:Dakar Libya:Tripoli Sudan:Khartoum Uganda:Kampala Rwanda:Kigali
        Zambia:Lusaka Zimbabwe:Harare Angola:Luanda Mali:Bamako Chad:Ndjamena Niger:Niamey Cameroon:Yaounde
        Gabon:Libreville Namibia:Windhoek Botswana:Gaborone Mozambique:Maputo Madagascar:Antananarivo
        Somalia:Mogadishu Togo:Lome Liberia:Monrovia Malawi:Lilongwe Eritrea:Asmara Gambia:Banjul
        Mauritius:Port_Louis""",
    "North America": """Canada:Ottawa Mexico:Mexico_City Cuba:Havana Jamaica:Kingston Haiti:Port_au_Prince
        Guatemala:Guatemala_City Honduras:Tegucigalpa Nicaragua:Managua Panama:Panama_City Barbados:Bridgetown
        Bahamas:Nassau Belize:Belmopan""",
    "South America": """Peru:Lima Chile:Santiago Argentina:Buenos_Aires Brazil:Brasilia Uruguay:Montevideo
        Colombia:Bogota Venezuela:Caracas Ecuador:Quito Bolivia:Sucre Paraguay:Asuncion Guyana:Georgetown
        Suriname:Paramaribo""",
    "Oceania": """Australia:Canberra New_Zealand:Wellington Fiji:Suva Samoa:Apia Tonga:Nukualofa Vanuatu:Port_Vila""",
}

CAPITALS: dict[str, str] = {}
CONTINENTS: dict[str, str] = {}
for _continent, _pairs in _BY_CONTINENT.items():
    for _pair in _pairs.split():
        _country, _capital = _pair.replace("_", " ").split(":")
        CAPITALS[_country], CONTINENTS[_country] = _capital, _continent

ELEMENTS = dict(
    pair.split(":")
    for pair in """hydrogen:H helium:He lithium:Li carbon:C nitrogen:N oxygen:O fluorine:F neon:Ne sodium:Na
        magnesium:Mg aluminium:Al silicon:Si phosphorus:P sulfur:S chlorine:Cl argon:Ar potassium:K calcium:Ca
        titanium:Ti chromium:Cr manganese:Mn iron:Fe cobalt:Co nickel:Ni copper:Cu zinc:Zn silver:Ag tin:Sn iodine:I
        tungsten:W platinum:Pt gold:Au mercury:Hg lead:Pb uranium:U""".split()
)

OPPOSITES = dict(
    pair.split(":")
    for pair in """hot:cold big:small tall:short fast:slow early:late full:empty open:closed wet:dry hard:soft
        light:dark old:young rich:poor loud:quiet clean:dirty strong:weak deep:shallow heavy:light near:far
        left:right up:down in:out day:night sweet:sour happy:sad true:false first:last buy:sell win:lose push:pull
        love:hate begin:end""".split()
)

YOUNG = dict(
    pair.split(":")
    for pair in """cat:kitten dog:puppy cow:calf horse:foal sheep:lamb goat:kid pig:piglet hen:chick duck:duckling
        goose:gosling bear:cub lion:cub fox:cub deer:fawn frog:tadpole swan:cygnet seal:pup owl:owlet""".split()
)

MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
NUMBER_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen twenty""".split()

NAMES = """Ada Ben Cleo Dan Eva Finn Gus Hana Ivan Jude Kira Leo Mia Noor Omar Pia Quinn Rosa Sam Tara Uma Vik Wren
Xena Yara Zoe Alma Boris Carl Dora Emil Fay Greta Hugo Ines Jonas Katya Liam Maya Nico""".split()
THINGS = """boat car house garden book lamp chair coat hat bag cup key map door ring clock drum kite bike tent table
pen box bell scarf basket bottle mirror ladder candle wallet pillow blanket hammer guitar violin carpet window bucket
wagon""".split()
COLORS = "red blue green yellow black white brown orange purple grey pink silver golden".split()
PLACES = """kitchen garden school office forest harbor library station market museum cellar attic garage tower bakery
theater""".split()
FRUITS = "apples pears plums lemons peaches cherries melons figs oranges grapes".split()
GOODS = "apples pears plums lemons coins stamps books pencils marbles shells cards eggs buttons stones".split()
ANIMALS = "cat dog cow horse sheep goat pig hen duck goose bear lion fox deer frog swan seal owl".split()
TOWNS = sorted({capital for capital in CAPITALS.values() if " " not in capital})
WORDS = sorted({*THINGS, *COLORS, *PLACES, *ANIMALS, *OPPOSITES, *OPPOSITES.values(), *ELEMENTS, *FRUITS})

SMALL_TALK = """The weather is mild today.
I like long walks.
The train was late again.
We had soup for lunch.
The river is calm.
Birds sing in the morning.
My shoes are wet.
The shop opens at nine.
It rained all night.
The bread smells good.
I am reading a long book.
The bus stops near the park.
My sister plays chess.
The moon is bright tonight.
We painted the fence last week.
There is dust on the shelf.
The film was too long.
A neighbor is moving out.
The tea is getting cold.
Somebody left the gate open.""".split("\n")

UNKNOWN_PLACES = (
    "Atlantis Narnia Mordor Utopia Lilliput Camelot Wonderland Zubrowka Freedonia Genovia Oz Xanadu"
).split()
