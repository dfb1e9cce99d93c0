"""Words of the Miś texts for price lists and regulations: goods, notes, rules, signatures.

Tables only. Our own making; knows nothing of how they are put together.
"""

from __future__ import annotations

GOODS = (
    ("oscypek", " wędzony", 1200, 2600),
    ("kawałek", " bundzu", 700, 1500),
    ("kubek", " herbaty z sokiem malinowym", 500, 1100),
    ("kubek", " żętycy", 300, 800),
    ("moskol", " z masłem czosnkowym", 800, 1600),
    ("słoik", " miodu spadziowego", 2800, 5200),
    ("słoik", " konfitury z żurawiny", 1400, 2600),
    ("para", " skarpet z owczej wełny", 2200, 4800),
    ("bochenek", " chleba na zakwasie", 900, 1700),
    ("pocztówka", " z Misiem", 150, 450),
    ("gwizdek", " na halny", 600, 1400),
    ("drożdżówka", " z serem", 350, 750),
    ("tabliczka", " czekolady na szczyt", 450, 950),
    ("paczka", " krówek", 800, 1600),
    ("dzwonek", " pasterski", 3200, 7600),
    ("czapka", " z pomponem", 2900, 5900),
    ("butelka", " wody źródlanej", 250, 550),
    ("latarka", " dla spóźnionych", 2400, 4900),
    ("koc", " w kratę", 5500, 9900),
    ("porcja", " kwaśnicy", 1300, 2400),
)

SHOP_NOTES = (
    "Na zeszyt kupują tylko ci, którzy umieją go potem przeczytać.",
    "Przy halnym powyżej {w} km/h pocztówek nie wystawia się na zewnątrz.",
    "Kto przyniesie własny kubek, płaci za herbatę o {drobne} mniej.",
    "Reklamacje rozpatruje Zośka, zwykle odmownie, zawsze z uśmiechem.",
    "Przy zakupie {m} par skarpet Zośka dorzuca radę na reumatyzm.",
    "Sklep jest czynny od {rano} do zmroku, a zmrok ogłasza Zośka.",
    "Owce obsługujemy bez kolejki, turystów według wzrostu.",
    "Ceny ostatnio zmieniły się {n:raz}, bo halny przestawił cyfry.",
    "Kto zapyta o drogę, dostaje ją za darmo, razem z {n} ostrzeżeniami.",
    "Płacić można gotówką, kartą, a po piętnastej także drewnem.",
)

RULED = (
    "schroniska „Pod Śpiącym Misiem”",
    "szlaku Bacy i Misia",
    "bacówki na Hali Długiej",
    "kolejki linowej „Halny”",
    "kuchni turystycznej",
    "parkingu pod reglami",
    "wypożyczalni sanek",
    "świetlicy w remizie",
    "zagrody edukacyjnej „Owca i Spółka”",
    "wspólnej suszarni butów",
)

RULES = (
    "Cisza nocna trwa od {wieczór} do {rano}; chrapanie Misia uznaje się za odgłos przyrody.",
    "Za zgubiony klucz pobiera się {cena}, a za znaleziony wypłaca połowę tej kwoty.",
    "Buty suszy się na kracie, nigdy nad zupą.",
    "Pies zostaje w sieni, owca przed progiem, a baca tam, gdzie chce.",
    "Gdy halny przekracza {w} km/h, okiennice zamyka dyżurny, a herbata jest za darmo.",
    "Wrzątek wydaje się od {rano}: pierwszy litr bezpłatnie, każdy następny za {drobne}.",
    "Ławę obliczono na {n:osoba}, przy czym Miś liczy się podwójnie.",
    "Kto pożyczył ciupagę, oddaje ją przed {wieczór} i bez nowych nacięć.",
    "Zabrania się uczenia echa brzydkich słów; kara wynosi {cena}.",
    "Sanki parkuje się równolegle do potoku, w rzędach po {n:para}.",
    "Przy temperaturze poniżej −{t} °C każdemu przysługuje dodatkowy koc.",
    "Ostatni gasi światło, pierwszy rozpala w piecu, a reszta nie przeszkadza.",
    "Opłata za nocleg wynosi {cena} i obejmuje widok, o ile nie ma mgły.",
    "Dzieci do lat {n} wchodzą bezpłatnie, jeśli umieją zameczeć.",
    "Śmieci znosi się w doliny; góra niczego nie zamawiała.",
    "Skarpety wiesza się parami, a po {n} dniach uznaje za dar dla schroniska.",
    "Grać na skrzypcach wolno do {wieczór}, na nerwach nie wolno wcale.",
    "Mapy wypożycza się na {n:godzina}, kompas tylko w komplecie z rozsądkiem.",
    "Kto zejdzie ze znakowanej ścieżki, wraca na nią sam i przeprasza kosodrzewinę.",
    "Oscypki przechowuje się w chłodzie, z dala od Misia, na wysokości co najmniej {m} dm.",
    "Skargi wpisuje się do zeszytu ołówkiem; gumka leży obok.",
    "Drewno dokłada się co {m:minuta}, nie częściej, bo piec też musi odetchnąć.",
    "W kolejce po kwaśnicę nie obowiązują tytuły, stopnie ani łokcie.",
    "Niedźwiedzi się nie dokarmia; Miś jest pracownikiem i je służbowo.",
    "Zasięg telefonu bywa na progu, zwykle około {rano}, i nie podlega reklamacji.",
    "Dyżurny ma rację do {wieczór}, później rację ma pogoda.",
)

SIGNATURES = (
    "Regulamin obowiązuje od {n}. dnia po ostatnim śniegu. Podpisano: {kto}.",
    "Zmiany wprowadza się uchwałą w obecności {m} osób i jednego Misia. Za zgodność: {kto}.",
    "Kto przeczytał całość, może poprosić o pieczątkę, którą trzyma {kto}.",
    "Nieznajomość regulaminu kosztuje {drobne}, znajomość nic. Zatwierdza {kto}.",
)
