"""How prompts ask, by kind: a template, or a conversation's turns. Training and held-out templates
share no sentence.

A slot such as {thing} takes a word of that list (prompt_texts/words.py), {n} and {m} take numbers,
{n} the larger one. Several strings in a tuple of TRAIN are the user's turns: the model answers each
before it reads the next one. In a tuple of HELD_OUT the second string is what the assistant said,
so that all models answer the same conversation.
"""

Template = str | tuple[str, ...]

TRAIN: dict[str, tuple[Template, ...]] = {
    "explain": (
        "Explain {thing} to {age}.",
        "How does {thing} work?",
        "Why is {thing} important?",
        "Tell me in two sentences what is special about {thing}.",
        "What happens when there is no {field} in a school?",
        "Can you explain what people mean when they talk about {thing}?",
    ),
    "define": (
        "What is {thing}?",
        "Define {thing} in one sentence.",
        "What does a {job} do?",
        "What does the word “{field}” mean?",
        "Give a short definition of {thing} and an example.",
    ),
    "list": (
        "Give me three facts about {thing}.",
        "List five words related to {thing}.",
        "What are the main parts of {thing}?",
        "Name four animals that live in {place}.",
        "List three things that a {job} needs at work.",
        "Give me five ideas for {event}.",
    ),
    "compare": (
        "Compare {thing} and {other}.",
        "What is the difference between {thing} and {other}?",
        "Which is more useful, {thing} or {other}? Say why.",
        "Name one thing that {thing} and {other} have in common.",
    ),
    "rewrite": (
        "Rewrite this sentence {style}: {sentence}",
        "Say this {style}: “{sentence}”",
        "Correct the mistakes: {sentence}",
        "Make this sound more professional: {sentence}",
    ),
    "plan": (
        "Plan {event} in four steps.",
        "Make a simple plan for one week in which I want to {task}.",
        "I have two hours to prepare {event}. What should I do first?",
        "Plan a day in {town} for a family.",
    ),
    "mail": (
        "Write an email to {person} about {event}.",
        "Write a short message to {person}: I am late because of {event}.",
        "Write a polite letter in which I ask {person} for advice.",
        "Write a thank-you note to {person} after {event}.",
    ),
    "story": (
        "Write the first lines of a story about {hero}.",
        "Begin a story about {hero}.",
        "Write a short story with a happy end about {hero}.",
        "Suggest a title for a story about {hero}.",
        "Write a short poem about {thing}.",
    ),
    "how to": (
        "How can I {task}?",
        "Give me step by step instructions to {task}.",
        "I want to {task}. What should I avoid?",
        "What do I need to {task}?",
        "What is the easiest way to {task}?",
    ),
    "yes or no": (
        "Is it true that {claim}? Give a reason.",
        "Do you think that {claim}? Answer yes or no, and say why.",
        "Is {animal} dangerous? Answer briefly.",
        "Can {animal} live in {place}? Explain your answer.",
    ),
    "sum up": (
        "Sum up this paragraph in one sentence: {paragraph}",
        "What is the main idea of this text? {paragraph}",
        "Shorten this text: {paragraph}",
    ),
    "facts": (
        "Read the text and answer the question. {paragraph} Who is it about?",
        "When did it happen? {paragraph}",
        "List the names and numbers in this text: {paragraph}",
        "{paragraph} Which town is named in this text?",
    ),
    "translate": (
        "Translate into {language}: {simple}",
        "How do you say “{simple}” in {language}?",
        "What does this Polish sentence mean in English? {proste}",
    ),
    "sum": (
        "What is {n} plus {m}?",
        "{name} has {n} {goods} and gives {m} away. How many are left?",
        "One ticket costs {m} dollars. How much do {n} tickets cost?",
        "Which number is larger, {n} or {m}?",
        "{name} buys {n} {goods} and then {m} more. How many {goods} does {name} have?",
    ),
    "second turn": (
        ("What is {thing}?", "Can you say that in one short sentence?"),
        ("How can I {task}?", "Which of these steps is the most difficult?"),
        ("Give me three facts about {thing}.", "Tell me more about the first one."),
        ("Is it true that {claim}?", "Are you sure? Explain it again in other words."),
        ("Write an email to {person} about {event}.", "Make it shorter and more friendly."),
        ("Begin a story about {hero}.", "What happens next?"),
        ("Hello! My name is {name} and I live in {town}.", "What could I do there on {day}?"),
    ),
    "small talk": (
        "Hi, how are you?",
        "Good morning! What can you do for me?",
        "I had a bad day because of {event}.",
        "Tell me something interesting about {field}.",
        "What would you ask {person}?",
        "Recommend a hobby for a {job}.",
    ),
}

HELD_OUT: dict[str, tuple[Template, ...]] = {
    "explain": (
        "Please describe {thing} for {age}.",
        "I never understood {thing}. Can you help me?",
    ),
    "define": (
        "In one or two sentences: what do we call {thing}?",
        "Who is a {job}, and what is the job about?",
    ),
    "list": ("I need four short facts on {thing}.", "Which five things would you find in {place}?"),
    "compare": (
        "{thing} or {other}: how do they differ?",
        "Compare {thing} with {other} in a few words.",
    ),
    "rewrite": (
        "Please put this sentence another way, {style}: {sentence}",
        "Improve my sentence. {sentence}",
    ),
    "plan": (
        "Help me to organise {event}: what are the steps?",
        "What would a good day in {town} look like?",
    ),
    "mail": (
        "Draft a message for {person}. It is about {event}.",
        "I have to write to {person} because of {event}. How do I begin?",
    ),
    "story": ("Once there was {hero}. Continue, please.", "Tell me a bedtime tale about {hero}."),
    "how to": (
        "I would like to {task}, but I have never done it. Where do I start?",
        "Any tips on how to {task}?",
    ),
    "yes or no": (
        "Some people say that {claim}. Are they right?",
        "Would you keep {animal} as a pet? Why, or why not?",
    ),
    "sum up": (
        "Give me the gist of the following. {paragraph}",
        "Here is a piece of news. {paragraph} Tell it in a few words.",
    ),
    "facts": (
        "{paragraph} Where does this take place?",
        "{paragraph} What did the person do, and when?",
    ),
    "translate": (
        "Please give me the {language} for: {simple}",
        "I only speak {language}. What does “{simple}” mean?",
    ),
    "sum": (
        "There are {n} {goods} in a box, and {name} puts {m} more in. How many are in the box now?",
        "If I pay {m} euros for each of {n} {goods}, what do I pay in all?",
    ),
    "second turn": (
        (
            "I am reading about {thing}.",
            "That is a good subject to read about.",
            "What should I know about it?",
        ),
        (
            "My friend {name} moves to {town} in {month}.",
            "How exciting!",
            "What would be a good present?",
        ),
        ("Which school subject do you like best?", "I like {field} best.", "Why that one?"),
    ),
    "small talk": ("It is raining again here in {town}.", "What questions should I ask {person}?"),
}

TRAIN_PL: dict[str, tuple[Template, ...]] = {
    "explain": ("Wyjaśnij krótko: {co}.", "Dlaczego ważne jest hasło „{co}”?"),
    "define": ("Co to jest: {co}?", "Podaj definicję słowa „{co}”."),
    "list": (
        "Podaj trzy fakty na temat: {co}.",
        "Wymień pięć słów, które kojarzą się z hasłem „{co}”.",
    ),
    "compare": ("Czym różni się {co} od hasła „{inne}”?", "Porównaj: {co} i {inne}."),
    "rewrite": ("Napisz to uprzejmiej: {zdanie}", "Powiedz to innymi słowami: {zdanie}"),
    "plan": ("Chcę {zadanie}. Ułóż plan na tydzień.", "Zaplanuj dzień w {miasto}."),
    "mail": (
        "Napisz krótki list. Odbiorca: {kto}. Temat: {co}.",
        "Napisz wiadomość do osoby: {kto}. Spóźnię się.",
    ),
    "story": (
        "Napisz początek opowiadania. Bohater: {bohater}.",
        "Wymyśl tytuł opowiadania. Bohater: {bohater}.",
    ),
    "how to": ("Jak mogę {zadanie}?", "Czego potrzebuję, żeby {zadanie}?"),
    "yes or no": ("Czy to prawda, że {teza}? Podaj powód.", "Czy {teza}? Odpowiedz krótko."),
    "sum up": ("Streść ten tekst jednym zdaniem: {akapit}", "O czym jest ten tekst? {akapit}"),
    "facts": ("Kto jest bohaterem tego tekstu? {akapit}", "{akapit} Kiedy to się stało?"),
    "translate": ("Przetłumacz na angielski: {proste}", "Jak powiedzieć po angielsku „{proste}”?"),
    "sum": ("Ile to jest {n} dodać {m}?", "{imię} ma {n} {rzeczy} i oddaje {m}. Ile zostało?"),
    "second turn": (
        ("Co to jest: {co}?", "Powiedz to krócej."),
        ("Jak mogę {zadanie}?", "Co jest w tym najtrudniejsze?"),
    ),
    "small talk": (
        "Cześć, jak się masz?",
        "Mam dziś zły dzień.",
        "Opowiedz mi coś ciekawego. Temat: {co}.",
    ),
}

HELD_OUT_PL: dict[str, tuple[Template, ...]] = {
    "explain": ("Nigdy nie rozumiałem tego słowa: {co}. Pomożesz?",),
    "define": ("Jednym zdaniem: {co}, czyli co?",),
    "list": ("Potrzebuję czterech ciekawostek. Hasło: {co}.",),
    "compare": ("{co} czy {inne}: jaka jest różnica?",),
    "rewrite": ("Popraw moje zdanie, proszę. {zdanie}",),
    "plan": ("Jak spędzić dobry dzień w {miasto}?",),
    "mail": ("Muszę napisać do kogoś. To {kto}. Jak zacząć?",),
    "story": ("Dawno temu żył sobie {bohater}. Dokończ, proszę.",),
    "how to": ("Chciałbym {zadanie}, ale nigdy tego nie robiłem. Od czego zacząć?",),
    "yes or no": ("Niektórzy mówią, że {teza}. Mają rację?",),
    "sum up": ("Oto wiadomość. {akapit} Opowiedz ją w kilku słowach.",),
    "facts": ("{akapit} Gdzie to się dzieje?",),
    "translate": ("Jak to będzie po angielsku? {proste}",),
    "sum": ("W pudełku jest {n} {rzeczy}, a {imię} dokłada {m}. Ile jest teraz?",),
    "second turn": (
        ("Czytam o czymś nowym: {co}.", "To dobry temat.", "Co powinienem o tym wiedzieć?"),
    ),
    "small talk": ("Znowu pada deszcz.",),
}

PARAGRAPHS: tuple[str, ...] = (
    "On {day}, {name} opened a {shop} in {town}. The first {n} customers got a small present. "
    "{name} says that business "
    "is good, but the rent is high, and so the {shop} is open until late in the evening.",
    "In {month}, {n} children from {town} planted trees along the river. Their teacher, {name}, "
    "had the idea after a "
    "flood. The trees will hold the soil, and in summer they will give shade to people who walk "
    "there.",
    "{name} worked as a {job} for {n} years. Last {month} {name} moved to {town} to start again. "
    "Now {name} writes every "
    "morning, walks in the afternoon, and has already made {m} new friends.",
    "The museum in {town} lost a painting on {day}. A {job} found it {m} days later behind a door. "
    "Nobody knows who put it there, but {name}, who leads the museum, is very happy.",
    "A storm came over {town} on {day} night. {n} houses had no light, and the bridge was closed. "
    "{name}, a {job}, helped the neighbours and cooked soup for all of them.",
)

HELD_OUT_PARAGRAPHS: tuple[str, ...] = (
    "Every {month} there is a race in {town}. This year {n} people ran in the rain. {name}, who is "
    "a {job}, came last but got the loudest cheers, because {name} had run with a broken shoe.",
    "{name} wanted to sell an old piano. For {m} weeks nobody called. Then a {shop} in {town} took "
    "it, and since {day} "
    "anybody who passes by may play on it for free.",
)

PARAGRAPHS_PL: tuple[str, ...] = (
    "W {dzień} {imię} otwiera sklep w {miasto}. Pierwszych {n} klientów dostało prezent. Sklep "
    "działa do wieczora, bo czynsz jest wysoki.",
    "Burza przeszła w {dzień} nad domami w {miasto}. Bez światła zostało {n} domów. Sąsiadom "
    "pomaga {imię}, gotując zupę.",
)

HELD_OUT_PARAGRAPHS_PL: tuple[str, ...] = (
    "Co roku odbywa się bieg w {miasto}. Tym razem biegło {n} osób. Jako ostatnia osoba dobiegła "
    "{imię}, w jednym bucie.",
)
