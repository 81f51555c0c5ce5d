"""Word lists of the bundled data's grammar, by the name of the slot they fill.

No entry holds a kind of text ("email", "note", "review", ...): the score looks for exactly one kind word in a generated
instruction, and a model that merely repeats the text must not earn it. `tests/test_bundled.py` holds that.
"""

from __future__ import annotations


def entries(text: str) -> tuple[str, ...]:
    """The entries of a list written with `|` or line breaks between them."""
    return tuple(entry for line in text.strip().splitlines() for entry in line.split("|") if entry)


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


FIRST_NAMES = words("""
Abena Ada Agnes Aiko Alba Amara Amir Anders Anton Arjun Astrid Basil Boris Bruno Carlos Chidi Clara Cora Dalia Daphne
Diego Dmitri Edith Elena Elias Elsa Emeka Enzo Esther Ezra Farah Felix Fiona Freya Gemma Greta Gwen Hamid Hana Harriet
Hector Hugo Ibrahim Ida Ines Ingrid Isaac Ivan Jamal Jasper Jonas Judith Julian Karim Keiko Kenji Kofi Laila Lars Leon
Lorenzo Lucia Magda Malik Marcus Marit Mateo Mei Mina Miriam Nadia Naomi Nikhil Nina Noor Olga Omar Oscar Otto Pablo
Petra Priya Rafael Ravi Rosa Rupert Samir Sanjay Selma Sofia Sunita Tariq Theo Tomas Ursula Vera Viktor Wanda Winston
Yara Yusuf Yvonne Zainab
""")

SURNAMES = words("""
Abara Ashdown Bellamy Birch Chandra Dalby Devlin Doyle Eklund Farrow Garrick Gupta Haddad Ivanov Jansen Kaplan Keane
Kimura Lowell Mensah Moreau Novak Okafor Osei Pereira Petrov Quill Rahman Reyes Rossi Sato Sharma Silva Tanaka Teller
Varga Webb Yilmaz
""")

ROOTS = words("""
Alder Amber Aspen Beacon Bramble Briar Brook Cedar Clover Copper Coral Crane Crown Dove Eagle Elm Ember Falcon Fern
Finch Garnet Granite Harbour Hawthorn Hazel Heron Holly Ivy Jasmine Juniper Kestrel Lantern Larch Lark Laurel Linden
Magpie Maple Marble Meadow Northgate Oak Olive Orchard Otter Pebble Pine Plum Poplar Quarry Raven River Robin Rowan
Saffron Silver Sparrow Spruce Thistle Thorn Tulip Violet Walnut Westgate Willow Windmill Wren Yew
""")

BRANDS = words("""
Aerolo Alvik Balto Bexley Bolano Brevo Calida Corvus Dalgo Delphin Elvar Fennix Galvo Gentra Halden Helio Hexa
Ivero Jorva Kanto Kelvor Kordal Lumo Lynden Mavix Mirano Morvik Nalto Norvik Olmo Orvida Pavo Pelago Quorra Ravelo
Rondo Salvo Sentra Solvik Tarn Tessera Torvald Umbra Velda Vireo Volta Wendal Yoro Zephra Zumo
""")

PRODUCTS = entries("""
kettle|toaster|backpack|desk lamp|headphones|blender|umbrella|office chair|air fryer|bicycle pump|coffee grinder|tent
raincoat|vacuum cleaner|keyboard|water bottle|sleeping bag|frying pan|alarm clock|electric drill|suitcase|printer
running shoes|bread maker|camping stove|garden hose
""")

SPOTS = entries(
    "Lake|Falls|Beach|Woods|Forest|Gardens|Island|Valley|Ridge|Caves|Abbey|Lighthouse|Marsh|Canyon|Bay|Hill"
)
VENUES = entries(
    "Library|Hall|Pool|Car Park|Gym|Station|Clinic|Theatre|Playground|Footbridge|Laundry|Market|Centre|School"
)
SHOPS = entries(
    "Bakery|Books|Cafe|Cycles|Dental|Florists|Pharmacy|Studios|Toys|Travel|Brewery|Ceramics|Hardware|Records"
)
CLUBS = entries(
    "Choir|Rowers|Chess Club|Gardeners|Runners|Orchestra|Book Club|Cricket Club|Hikers|Drama Group|Cyclists|Quilters"
)

SUBJECTS = {
    "meeting": (
        "budget meeting|design workshop|hiring interview|sales call|planning session|team lunch|project kickoff"
        "|board meeting|safety briefing|client visit|training day|yearly appraisal|staff meeting|product demo"
    ),
    "document": (
        "signed contract|travel receipts|floor plan|holiday schedule|draft report|guest list|price list|meeting minutes"
        "|insurance form|invoice|supplier list|test results|site photos|marketing plan"
    ),
    "favour": (
        "help with the move|kind words at the funeral|lift to the airport|advice on the thesis|box of plums"
        "|tour of the factory|loan of the ladder|warm welcome last week|birthday cake|work on the website|spare tickets"
        "|careful proofreading"
    ),
    "chore": (
        "water the tomatoes|feed the cat|take out the recycling|bring in the laundry|walk the dog|defrost the freezer"
        "|collect the parcel|lock the back door|turn off the oven|sign the school form|fold the towels|buy some milk"
    ),
    "thing": (
        "spare key|bike lock|torch|phone charger|sewing box|passport|library card|toolbox|picnic blanket|bus pass"
        "|camera|bread knife"
    ),
    "work": (
        "roof repairs|electrical work|a deep clean|new flooring|painting|a safety inspection|a burst pipe|lift repairs"
        "|heating repairs|pest control|window replacement|storm damage"
    ),
    "lost": (
        "a silver bracelet|a red scarf|a child's glove|a pair of glasses|a blue bicycle|a leather wallet|a tennis bag"
        "|a set of house keys|a green rucksack|a wooden flute|a hearing aid|a walking stick"
    ),
    "rule": (
        "dogs on a lead|no ball games|no glass bottles|no hot food|quiet after nine|shoes off at the door|no smoking"
        "|children with an adult|no bicycles inside|no loud music"
    ),
    "appointment": (
        "dental check-up|eye test|blood test|physiotherapy session|vaccination|hearing test|skin check|knee scan"
        "|annual check-up|follow-up visit"
    ),
    "rehearsal": (
        "autumn concert|spring fair|annual dinner|summer trip|charity evening|winter show|members' evening|photo day"
        "|committee election|open day"
    ),
    "loan": (
        "tennis racket|cookery book|tent|projector|guitar|bicycle helmet|folding table|winter coat|sewing machine|drill"
        "|suitcase|board game"
    ),
    "praise": (
        "solid build|low price|fast delivery|bright colour|light weight|simple design|neat packaging"
        "|long guarantee|comfortable grip|soft finish"
    ),
    "fault": (
        "thin plastic|weak hinge|scratched surface|confusing manual|strong chemical smell|missing screw"
        "|cracked corner|loose handle|faulty switch|crooked base"
    ),
    "activity": (
        "a sunrise walk|a picnic|bird watching|a treasure hunt|a pottery class|a guided tour|sketching"
        "|a school trip|a bike ride|night photography|a family outing|yoga by the water"
    ),
    "service": (
        "home delivery|a loyalty card|evening classes|a repair desk|gift wrapping|free tasting sessions|a summer menu"
        "|an online shop|a children's corner|same-day orders|student discounts|a members' night"
    ),
    "role": (
        "manager|head baker|buyer|apprentice|director|accountant|chief designer|shop assistant|workshop leader|cashier"
        "|head of sales|delivery driver"
    ),
    "award": (
        "best small business prize|green energy award|city design prize|customer service award|local heroes medal"
        "|young traders prize|craft of the year award|fair employer award|golden spoon|window display prize"
    ),
    "party": (
        "birthday dinner|housewarming party|garden barbecue|retirement lunch|wedding party|quiz night"
        "|farewell lunch|film evening|naming ceremony|harvest supper|surprise party|street party"
    ),
    "show": (
        "pottery exhibition|piano recital|poetry reading|photography show|school play|jazz concert|book launch"
        "|dance performance|science fair|puppet show"
    ),
}

OTHERS = {
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "time": "8 am|9 am|10 am|11 am|noon|1 pm|2 pm|3 pm|4 pm|5 pm|6 pm|7 pm",
    "hour": "half past six|half past seven|half past eight|half past nine|a quarter to eight|a quarter past nine",
    "month": "January|February|March|April|May|June|July|August|September|October|November|December",
    "weather": "cold and clear|warm and windy|grey and damp|bright and still|foggy at first|hot and dry",
    "room": "kitchen|hallway|garage|attic|bathroom|spare room",
    "dish": "mushroom pie|lemon cake|bean stew|apple crumble|fish soup|rice salad",
    "count": "two|three|four|five|six|seven",
    "street": "Mill Road|Station Road|High Street|Park Lane|Bridge Street|Church Lane|Canal Walk|Hill Rise",
}


# Entities are one word of the first list, followed by one of the second where there is a second.
ENTITIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "person": (FIRST_NAMES, ()),
    "doctor": (("Dr",), SURNAMES),
    "spot": (ROOTS, SPOTS),
    "venue": (ROOTS, VENUES),
    "shop": (ROOTS, SHOPS),
    "club": (ROOTS, CLUBS),
    "product": (BRANDS, PRODUCTS),
}

SLOTS: dict[str, tuple[str, ...]] = {slot: entries(text) for slot, text in {**SUBJECTS, **OTHERS}.items()}
