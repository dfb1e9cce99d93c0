"""Tools, and how people ask for them: a dozen that judge a model and a dozen that it learns from.

The two dozens share no tool, no sentence and no word of the lists. A phrase is an imperative that
begins with a small letter, so that two can be joined. Its slots are the arguments of the call: a
word is filled in as people say it, and stands in the call as the tool wants it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# what people say: what the call holds
Words = Mapping[str, Any]


@dataclass(frozen=True)
class Tool:
    """A tool in JSON Schema's words, and phrases that ask for it.

    arguments: {name: (type, description, more of its schema)}. needed: the required ones. plain:
    phrases with the required arguments alone. more: phrases that have optional ones, too. slots:
    {name of a slot: words}; a slot is named like its argument. result: what the tool gives.
    defaults: what an optional argument is where it is not given.
    """

    description: str
    arguments: Mapping[str, tuple[str, str, Mapping[str, Any]]]
    needed: Sequence[str]
    plain: Sequence[str]
    more: Sequence[str]
    slots: Mapping[str, Words]
    result: str = '{"ok": true}'
    defaults: Mapping[str, Any] = field(default_factory=dict)


def same(*words: str) -> Words:
    """Words that the call holds as people say them."""
    return {word: word for word in words}


NUMBERS = {str(n): n for n in (3, 5, 7, 8, 12, 15, 20, 25, 40, 45)}
JUDGE: dict[str, Tool] = {
    "get_weather": Tool(
        "Weather of a city, today or on one of the next days.",
        {
            "city": ("string", "name of the city", {}),
            "day": (
                "string",
                "which day; default: today",
                {"enum": ["today", "tomorrow", "weekend"]},
            ),
            "unit": ("string", "default: celsius", {"enum": ["celsius", "fahrenheit"]}),
        },
        ["city"],
        (
            "tell me what the weather is like in {city}",
            "check the weather in {city}",
            "find out whether it is raining in {city}",
        ),
        (
            "tell me what the weather in {city} will be like {day}",
            "check the forecast for {city} {day}",
            "show me the temperature in {city} in {unit}",
        ),
        {
            "city": same("Lyon", "Porto", "Bergen", "Zagreb", "Leeds", "Turin", "Ghent", "Graz"),
            "day": {"tomorrow": "tomorrow", "at the weekend": "weekend"},
            "unit": {"Fahrenheit": "fahrenheit", "degrees Fahrenheit": "fahrenheit"},
        },
        '{"sky": "cloudy", "degrees": 14}',
        {"day": "today", "unit": "celsius"},
    ),
    "set_timer": Tool(
        "Starts a timer.",
        {
            "minutes": ("integer", "how long", {}),
            "label": ("string", "what the timer is for", {}),
        },
        ["minutes"],
        (
            "set a timer for {minutes} minutes",
            "start a {minutes}-minute timer",
        ),
        (
            'set a timer called "{label}" for {minutes} minutes',
            'start a {minutes}-minute timer with the label "{label}"',
        ),
        {"minutes": NUMBERS, "label": same("pasta", "laundry", "tea", "bread", "piano")},
        '{"running": true}',
    ),
    "convert_currency": Tool(
        "Converts an amount of money at today's rate.",
        {
            "amount": ("number", "how much", {}),
            "source": (
                "string",
                "currency of the amount",
                {"enum": ["EUR", "USD", "GBP", "PLN", "CHF"]},
            ),
            "target": (
                "string",
                "currency to convert to",
                {"enum": ["EUR", "USD", "GBP", "PLN", "CHF"]},
            ),
        },
        ["amount", "source", "target"],
        (
            "convert {amount} {source} to {target}",
            "work out how much {amount} {source} are in {target}",
            "change {amount} {source} into {target} for me",
        ),
        (),
        {
            "amount": {"250": 250, "80": 80, "19.50": 19.5, "1200": 1200, "64": 64, "7.25": 7.25},
            "source": {"euros": "EUR", "US dollars": "USD", "British pounds": "GBP"},
            "target": {"Polish zloty": "PLN", "Swiss francs": "CHF"},
        },
        '{"amount": 311.4}',
    ),
    "send_message": Tool(
        "Sends a text message to somebody in the address book.",
        {
            "to": ("string", "name of the person", {}),
            "text": ("string", "the message, word for word", {}),
            "urgent": ("boolean", "whether it rings loudly; default: false", {}),
        },
        ["to", "text"],
        (
            'send {to} the message "{text}"',
            'text {to}: "{text}"',
            'write a message to {to} that says "{text}"',
        ),
        ('send {to} the {urgent} message "{text}"', 'text {to} "{text}" and mark it as {urgent}'),
        {
            "to": same("Marta", "Oliver", "Priya", "Jonas", "Beatriz", "Kofi"),
            "text": same(
                "I will be ten minutes late",
                "The keys are under the mat",
                "Happy birthday",
                "Can we meet on Thursday?",
                "The parcel has arrived",
            ),
            "urgent": {"urgent": True},
        },
        '{"sent": true}',
        {"urgent": False},
    ),
    "find_train": Tool(
        "Lists trains between two stations on a day.",
        {
            "origin": ("string", "where the journey begins", {}),
            "destination": ("string", "where it ends", {}),
            "date": ("string", "day, as YYYY-MM-DD", {}),
            "travel_class": ("integer", "1 or 2; default: 2", {"enum": [1, 2]}),
        },
        ["origin", "destination", "date"],
        (
            "find a train from {origin} to {destination} on {date}",
            "look for trains that go from {origin} to {destination} on {date}",
            "see how I can get from {origin} to {destination} by train on {date}",
        ),
        (
            "find a {travel_class} train from {origin} to {destination} on {date}",
            "look for {travel_class} seats on a train from {origin} to {destination} on {date}",
        ),
        {
            "origin": same("Bremen", "Lille", "Padua", "Brno"),
            "destination": same("Hamburg", "Brussels", "Verona", "Vienna"),
            "date": same("2026-03-14", "2026-05-02", "2026-09-21", "2026-11-30"),
            "travel_class": {"first-class": 1},
        },
        '{"trains": [{"leaves": "09:12", "arrives": "11:47"}]}',
        {"travel_class": 2},
    ),
    "play_music": Tool(
        "Plays music of an artist.",
        {
            "artist": ("string", "who plays or sings", {}),
            "shuffle": ("boolean", "in random order; default: false", {}),
        },
        ["artist"],
        ("play some music by {artist}", "put on {artist}", "play songs of {artist}"),
        ("play songs by {artist} {shuffle}", "put on some {artist} {shuffle}"),
        {
            "artist": same("Nina Simone", "Daft Punk", "Miles Davis", "Abba", "Fela Kuti", "Enya"),
            "shuffle": {"in random order": True, "on shuffle": True},
        },
        '{"playing": true}',
        {"shuffle": False},
    ),
    "add_to_list": Tool(
        "Adds things to one of the user's lists.",
        {
            "list": ("string", "which list", {"enum": ["shopping", "packing", "to-do"]}),
            "items": ("array", "what to add, one thing each", {"items": {"type": "string"}}),
        },
        ["list", "items"],
        (
            "put {items} on my {list} list",
            "add {items} to the {list} list",
            "write {items} on the {list} list",
        ),
        (),
        {
            "list": {"shopping": "shopping", "packing": "packing"},
            "items": {
                "batteries": ["batteries"],
                "soap and matches": ["soap", "matches"],
                "tape": ["tape"],
                "socks and sunscreen": ["socks", "sunscreen"],
                "candles, string and glue": ["candles", "string", "glue"],
            },
        },
    ),
    "set_light": Tool(
        "Sets the light of a room.",
        {
            "room": ("string", "which room", {"enum": ["kitchen", "bedroom", "hall", "study"]}),
            "brightness": ("integer", "percent, from 0 to 100", {"minimum": 0, "maximum": 100}),
            "colour": ("string", "default: white", {"enum": ["white", "red", "blue", "green"]}),
        },
        ["room", "brightness"],
        (
            "set the light in the {room} to {brightness} percent",
            "dim the {room} light to {brightness} %",
            "turn the lights in the {room} to {brightness} percent brightness",
        ),
        (
            "make the light in the {room} {colour}, at {brightness} percent",
            "set the {room} light to {colour} and {brightness} % brightness",
        ),
        {
            "room": same("kitchen", "bedroom", "hall", "study"),
            "brightness": {"10": 10, "30": 30, "55": 55, "70": 70, "100": 100},
            "colour": same("red", "blue", "green"),
        },
        '{"done": true}',
        {"colour": "white"},
    ),
    "translate": Tool(
        "Translates a text.",
        {
            "text": ("string", "the text, word for word", {}),
            "language": (
                "string",
                "language to translate into",
                {"enum": ["French", "Spanish", "Polish", "Swedish"]},
            ),
            "formal": ("boolean", "in formal words; default: false", {}),
        },
        ["text", "language"],
        (
            'translate "{text}" into {language}',
            'have "{text}" translated into {language}',
            'give me the {language} for "{text}"',
        ),
        ('translate "{text}" into {formal} {language}',),
        {
            "text": same(
                "Where is the station?", "Good evening", "The soup is cold", "See you soon"
            ),
            "language": same("French", "Spanish", "Polish", "Swedish"),
            "formal": {"formal": True},
        },
        '{"translation": "..."}',
        {"formal": False},
    ),
    "book_table": Tool(
        "Books a table in a restaurant for today.",
        {
            "restaurant": ("string", "name of the restaurant", {}),
            "people": ("integer", "how many guests", {}),
            "time": ("string", "as HH:MM, 24 hours", {}),
            "outside": ("boolean", "a table outside; default: false", {}),
        },
        ["restaurant", "people", "time"],
        (
            "book a table for {people} at {restaurant} at {time}",
            "reserve a table at {restaurant} for {people} people at {time}",
        ),
        (
            "book a table {outside} for {people} at {restaurant} at {time}",
            "reserve a table for {people} people at {restaurant} at {time}, {outside}",
        ),
        {
            "restaurant": same("Casa Lola", "The Blue Door", "Nonna Rosa", "Zum Anker"),
            "people": {"two": 2, "four": 4, "5": 5, "six": 6, "3": 3},
            "time": same("18:30", "19:00", "20:15", "12:45"),
            "outside": {"outside": True},
        },
        '{"booked": true, "table": 9}',
        {"outside": False},
    ),
    "set_thermostat": Tool(
        "Sets the temperature of a room.",
        {
            "room": ("string", "which room", {"enum": ["bathroom", "office", "nursery", "attic"]}),
            "degrees": ("number", "in degrees Celsius", {}),
        },
        ["room", "degrees"],
        (
            "heat the {room} to {degrees} degrees",
            "set the thermostat in the {room} to {degrees} degrees",
            "bring the temperature in the {room} to {degrees} °C",
        ),
        (),
        {
            "room": same("bathroom", "office", "nursery", "attic"),
            "degrees": {"19": 19, "21.5": 21.5, "23": 23, "18": 18, "20.5": 20.5},
        },
        '{"done": true}',
    ),
    "track_parcel": Tool(
        "Says where a parcel is.",
        {"number": ("string", "the parcel's number", {})},
        ["number"],
        (
            "find out where parcel {number} is",
            "track parcel {number}",
            "look up the parcel with the number {number}",
        ),
        (),
        {"number": same("AX40917", "KD22865", "PL73310", "QT58042", "ZB19476")},
        '{"status": "on its way", "arrives": "tomorrow"}',
    ),
}

# Asked with tools at hand that do not help: the answer is words.
JUDGE_NONE = (
    "Write two sentences about {thing}.",
    "Why do people like {thing}?",
    "What is the capital of {country}?",
    "Thank you, that was very helpful!",
    "Explain to a child why the sky is blue.",
    "What is {m} times {n}?",
    "Give me a title for a story about {thing}.",
    "Is {country} in Europe?",
    "Which is bigger, a mouse or {animal}?",
    "How many legs does {animal} have?",
    "Tell me a joke about {animal}.",
    "What colour do you get from yellow and blue?",
    "Name three things made of wood.",
    "Can you explain what a noun is?",
)
JUDGE_NONE_WORDS: dict[str, Sequence[str]] = {
    "thing": (
        "lighthouses",
        "old maps",
        "snow",
        "chess",
        "bicycles",
        "libraries",
        "the moon",
        "kites",
        "bridges",
        "winter",
    ),
    "country": ("Portugal", "Kenya", "Norway", "Chile", "Japan", "Greece", "Egypt", "Peru"),
    "animal": ("a horse", "an owl", "a spider", "a whale", "a goat", "a penguin", "a bear"),
    "m": ("6", "7", "9"),
    "n": ("3", "4", "8"),
}
OPENINGS = ("{}.", "Please {}.", "Could you {}?", "Can you {}?", "I would like you to {}.")
TWO = ("{}, and {}.", "Please {} and then {}.", "Could you {} and also {}?", "First {}, then {}.")

LEARN: dict[str, Tool] = {
    "create_event": Tool(
        "Puts an event into the calendar.",
        {
            "title": ("string", "what it is", {}),
            "date": ("string", "day, as YYYY-MM-DD", {}),
            "time": ("string", "as HH:MM; default: all day", {}),
        },
        ["title", "date"],
        ('put "{title}" into my calendar for {date}', 'create an event "{title}" on {date}'),
        ('create an event "{title}" on {date} at {time}',),
        {
            "title": same("Dentist", "Parents' evening", "Choir", "Car service", "Book club"),
            "date": same("2026-02-03", "2026-04-17", "2026-06-25", "2026-10-08"),
            "time": same("08:15", "14:00", "17:45"),
        },
    ),
    "search_recipes": Tool(
        "Finds recipes.",
        {
            "ingredient": ("string", "what to cook with", {}),
            "diet": ("string", "default: any", {"enum": ["any", "vegan", "vegetarian"]}),
        },
        ["ingredient"],
        ("find a recipe with {ingredient}", "look for something to cook with {ingredient}"),
        ("find a {diet} recipe with {ingredient}",),
        {
            "ingredient": same("lentils", "courgettes", "rice", "mushrooms", "beetroot"),
            "diet": same("vegan", "vegetarian"),
        },
    ),
    "calculate_tip": Tool(
        "Works out a tip.",
        {
            "bill": ("number", "amount of the bill", {}),
            "percent": ("number", "default: 10", {}),
        },
        ["bill"],
        ("work out the tip for a bill of {bill}", "calculate a tip on {bill}"),
        ("calculate a tip of {percent} percent on {bill}",),
        {
            "bill": {"38.40": 38.4, "112": 112, "56.90": 56.9},
            "percent": {"12": 12, "18": 18, "20": 20},
        },
    ),
    "get_stock_price": Tool(
        "Price of a share.",
        {"symbol": ("string", "symbol of the share", {})},
        ["symbol"],
        ("tell me the price of {symbol}", "look up how {symbol} shares stand"),
        (),
        {"symbol": same("AAPL", "SAP", "NOKIA", "TSLA", "SHEL")},
    ),
    "find_hotel": Tool(
        "Finds hotels in a city.",
        {
            "city": ("string", "where", {}),
            "nights": ("integer", "how many nights", {}),
            "stars": ("integer", "at least so many stars", {"minimum": 1, "maximum": 5}),
        },
        ["city", "nights"],
        (
            "find a hotel in {city} for {nights} nights",
            "look for a room in {city} for {nights} nights",
        ),
        ("find a hotel with {stars} stars in {city} for {nights} nights",),
        {
            "city": same("Seville", "Dublin", "Kraków", "Tallinn", "Naples"),
            "nights": {"two": 2, "three": 3, "4": 4},
            "stars": {"four": 4, "five": 5, "3": 3},
        },
    ),
    "set_alarm": Tool(
        "Sets an alarm clock.",
        {
            "time": ("string", "as HH:MM, 24 hours", {}),
            "repeat": ("string", "default: once", {"enum": ["once", "daily", "weekdays"]}),
        },
        ["time"],
        ("set an alarm for {time}", "wake me at {time}"),
        ("set an alarm for {time} {repeat}",),
        {
            "time": same("05:50", "06:30", "07:10", "09:00"),
            "repeat": {"every day": "daily", "on weekdays": "weekdays"},
        },
    ),
    "get_route": Tool(
        "Finds the way to a place.",
        {
            "destination": ("string", "where to", {}),
            "by": ("string", "default: car", {"enum": ["car", "bike", "foot"]}),
        },
        ["destination"],
        ("show me the way to the {destination}", "find a route to the {destination}"),
        ("find a route to the {destination} by {by}",),
        {
            "destination": same("town hall", "airport", "swimming pool", "museum", "harbour"),
            "by": same("bike", "car"),
        },
    ),
    "order_taxi": Tool(
        "Orders a taxi.",
        {
            "address": ("string", "where it picks up", {}),
            "passengers": ("integer", "default: 1", {}),
        },
        ["address"],
        ("order a taxi to {address}", "call me a cab at {address}"),
        ("order a taxi for {passengers} people to {address}",),
        {
            "address": same("12 Mill Lane", "8 Station Road", "40 Park Street"),
            "passengers": {"three": 3, "4": 4, "two": 2},
        },
    ),
    "read_news": Tool(
        "Reads the latest news.",
        {
            "topic": (
                "string",
                "about what",
                {"enum": ["sport", "science", "business", "culture"]},
            ),
            "count": ("integer", "how many reports; default: 3", {}),
        },
        ["topic"],
        ("read me the {topic} news", "give me the latest news about {topic}"),
        ("read me {count} reports about {topic}",),
        {
            "topic": same("sport", "science", "business", "culture"),
            "count": {"two": 2, "five": 5, "four": 4},
        },
    ),
    "water_garden": Tool(
        "Waters a part of the garden.",
        {
            "bed": ("string", "which part", {"enum": ["roses", "herbs", "lawn", "tomatoes"]}),
            "litres": ("number", "how much water", {}),
        },
        ["bed", "litres"],
        ("water the {bed} with {litres} litres", "give the {bed} {litres} litres of water"),
        (),
        {
            "bed": same("roses", "herbs", "lawn", "tomatoes"),
            "litres": {"6": 6, "2.5": 2.5, "30": 30},
        },
    ),
    "convert_units": Tool(
        "Converts a quantity into another unit.",
        {
            "value": ("number", "how much", {}),
            "source": ("string", "its unit", {"enum": ["mile", "pound", "inch"]}),
            "target": (
                "string",
                "unit to convert to",
                {"enum": ["kilometre", "kilogram", "centimetre"]},
            ),
        },
        ["value", "source", "target"],
        ("convert {value} {source} to {target}", "tell me how many {target} {value} {source} are"),
        (),
        {
            "value": {"26": 26, "180": 180, "5.5": 5.5},
            "source": {"miles": "mile"},
            "target": {"kilometres": "kilometre"},
        },
    ),
    "lend_book": Tool(
        "Notes that somebody has borrowed a book.",
        {
            "title": ("string", "title of the book", {}),
            "reader": ("string", "who borrows it", {}),
            "weeks": ("integer", "for how long; default: 4", {}),
        },
        ["title", "reader"],
        ('lend "{title}" to {reader}', 'note that {reader} has borrowed "{title}"'),
        ('lend "{title}" to {reader} for {weeks} weeks',),
        {
            "title": same("Emma", "Dracula", "Middlemarch", "Treasure Island"),
            "reader": same("Hana", "Luis", "Greta", "Ahmed"),
            "weeks": {"two": 2, "six": 6},
        },
    ),
}
LEARN_NONE = (
    "Tell me something interesting about {thing}.",
    "Who wrote {book}?",
    "How do you make {dish}?",
    "What is the opposite of {word}?",
    "Good morning! How are you today?",
    "Write a short poem about {thing}.",
    "Is it true that {thing} can be dangerous?",
    "Give me a reason to learn about {thing}.",
)
LEARN_NONE_WORDS: dict[str, Sequence[str]] = {
    "thing": ("volcanoes", "honey bees", "trains", "gold", "mountains", "sleep", "rivers"),
    "book": ("Hamlet", "Frankenstein", "The Hobbit", "Ulysses"),
    "dish": ("pancakes", "tomato soup", "an omelette", "porridge"),
    "word": ("loud", "early", "narrow", "brave"),
}
