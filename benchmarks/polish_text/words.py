"""Words of the Miś dataset: tables of our own Polish sentences.

Knows no chance: `documents` draws the values and puts the documents together. {n:owca} is a number
with its noun ("5 owiec"), {n:!owca} the noun alone (`polish`); the placeholders are those of
`documents._say`. Place names are real, prices and timetables are made up.
"""

from __future__ import annotations

# Nominative, dative, ending of the past tense (kupił, kupiła).
PEOPLE = (
    ("baca Staszek", "bacy Staszkowi", ""),
    ("juhas Jędrek", "juhasowi Jędrkowi", ""),
    ("gaździna Hanka", "gaździnie Hance", "a"),
    ("sklepowa Zośka", "sklepowej Zośce", "a"),
    ("Miś", "Misiowi", ""),
    ("turysta z Gdyni", "turyście z Gdyni", ""),
    ("wnuczka Marysia", "wnuczce Marysi", "a"),
    ("listonosz Wojtek", "listonoszowi Wojtkowi", ""),
    ("przewodniczka Kasia", "przewodniczce Kasi", "a"),
    ("Bartuś z Ochotnicy", "Bartusiowi z Ochotnicy", ""),
    ("organista Klemens", "organiście Klemensowi", ""),
    ("ciotka Bronia", "ciotce Broni", "a"),
)

DAYS = (
    "w poniedziałek",
    "we wtorek",
    "w środę",
    "w czwartek",
    "w piątek",
    "w sobotę",
    "w niedzielę",
)

SCENES = (
    "{Dzień} halny wiał z prędkością {w} km/h i zdmuchnął z płotu {n:czapka}.",
    "{Dzień} rano termometr na ganku pokazywał −{t} °C, a Miś udawał, że jeszcze śpi.",
    "{Kto} wypatrzył{a} {dzień} nad granią chmurę w kształcie oscypka i uznał{a} to za dobry znak.",
    "Jak opowiada {kto}, {dzień} spadło {m} cm śniegu, ale nikt poza owcami tego nie zauważył.",
    "{Dzień} przed chałupą czekało {m} turystów, a herbaty starczyło akurat dla wszystkich.",
    "{Kto} wstał{a} {dzień} o {rano}, zanim baca zdążył zagwizdać na psa.",
    "Nad Nowym Targiem {dzień} świeciło słońce, choć w radiu straszyli halnym do {w} km/h.",
    "{Dzień} {kto} policzył{a} dzwonki na hali i wyszło, że jest ich dokładnie {m}.",
    "Miś usiadł {dzień} na progu, nalał herbaty i przez {m:minuta} patrzył na Giewont.",
    "{Kto} przyjechał{a} {dzień} pierwszym autobusem i od progu zapytał{a} o żętycę.",
    "{Dzień} po południu mgła przykryła regle tak gęsto, że {kto} pomylił{a} owcę z sąsiadem.",
    "GÓRAL, maskotka wsi, zjadł {dzień} {n:moskol} i poprosił o dokładkę.",
)

CLOSINGS = (
    "Miś pokiwał głową, dopił herbatę i zapisał to wszystko w zeszycie na stronie {m}.",
    "Na koniec {kto} zagrał{a} na fujarce, a echo pomyliło się tylko {n:raz}.",
    "Reszta jest prosta: trzeba mieć ciepłe skarpety i nie kłócić się z halnym.",
    "Jeśli coś się nie zgadza, winny jest halny; reklamacje przyjmuje {kto}.",
    "Kto dotarł do tego miejsca, zasłużył na {n:łyk} żętycy i miejsce przy piecu.",
    "{Kto} dodał{a} jeszcze, że w górach nawet zegar chodzi pod górkę.",
    "Potem wszyscy poszli spać, tylko owce liczyły juhasów aż do {m}.",
    "Baca mówi, że prawdy są trzy, ale rachunek jest zawsze jeden.",
    "I na tym {kto} skończył{a}, bo w kotle zaczęło kipieć.",
    "Zapiski zostawiono pod kamieniem, {m:krok} od źródła, gdzie halny nie sięga.",
)

# Title, ingredients for two portions as (noun, amount, the rest), steps. {s} is a short time, {d} a
# long one.
DISHES: tuple[tuple[str, tuple[tuple[str, int, str], ...], tuple[str, ...]], ...] = (
    (
        "pierogi ruskie",
        (
            ("gram", 200, " mąki pszennej"),
            ("gram", 250, " ziemniaków"),
            ("gram", 120, " twarogu"),
            ("cebula", 1, ""),
            ("łyżka", 1, " oleju"),
        ),
        (
            "Z mąki, ciepłej wody i oleju zagnieć miękkie ciasto i przykryj je ściereczką na "
            "{d:minuta}.",
            "Ziemniaki ugotuj, utłucz i zmieszaj z twarogiem oraz podsmażoną cebulą.",
            "Dopraw farsz solą i pieprzem tak odważnie, jakby miał go próbować sam baca.",
            "Rozwałkuj ciasto, wykrawaj krążki, nakładaj farsz i zlepiaj brzegi.",
            "Gotuj w osolonej wodzie {s:minuta} od chwili, gdy wypłyną.",
        ),
    ),
    (
        "kwaśnica",
        (
            ("gram", 300, " kiszonej kapusty"),
            ("gram", 200, " wędzonych żeberek"),
            ("gram", 200, " ziemniaków"),
            ("ząbek", 2, " czosnku"),
            ("ziarno", 4, " pieprzu"),
        ),
        (
            "Żeberka zalej zimną wodą, dorzuć pieprz i gotuj na małym ogniu {d:minuta}.",
            "Kapustę odciśnij, ale soku nie wylewaj: bez niego kwaśnica nie jest kwaśna.",
            "Włóż kapustę do wywaru i gotuj razem jeszcze {d2:minuta}.",
            "Dodaj ziemniaki pokrojone w kostkę i czosnek roztarty z solą.",
            "Podawaj gorącą, z pajdą chleba i bez śmietany, bo zabielanej baca nie uznaje.",
        ),
    ),
    (
        "moskole",
        (
            ("gram", 300, " ugotowanych ziemniaków"),
            ("gram", 150, " mąki"),
            ("jajko", 1, ""),
            ("szczypta", 1, " soli"),
        ),
        (
            "Ziemniaki przepuść przez praskę i odstaw na {d:minuta}, żeby odparowały.",
            "Dodaj mąkę, sól i to, co dała kura, po czym szybko zagnieć ciasto.",
            "Uformuj okrągłe placki grube na centymetr.",
            "Piecz je na gorącej blasze bez tłuszczu, po {s:minuta} z każdej strony.",
            "Smaruj masłem czosnkowym, póki parzą; zimnego moskola nikt na hali nie widział.",
        ),
    ),
    (
        "żurek",
        (
            ("mililitr", 250, " zakwasu żytniego"),
            ("gram", 150, " białej kiełbasy"),
            ("jajko", 2, ""),
            ("ząbek", 1, " czosnku"),
            ("łyżeczka", 1, " majeranku"),
        ),
        (
            "Kiełbasę zalej wodą i podgrzewaj {d:minuta}, ani razu nie dopuszczając do wrzenia.",
            "Wyjmij kiełbasę, a do wywaru wlej zakwas, mieszając, żeby nie było grudek.",
            "Dodaj czosnek oraz majeranek roztarty w dłoniach.",
            "Gotuj jeszcze {s:minuta}, aż zupa lekko zgęstnieje.",
            "Podawaj z plasterkami kiełbasy i jajkiem ugotowanym na twardo.",
        ),
    ),
    (
        "bigos juhasa",
        (
            ("gram", 300, " kiszonej kapusty"),
            ("gram", 150, " wołowiny"),
            ("gram", 100, " kiełbasy"),
            ("śliwka", 4, ""),
            ("ziarno", 3, " jałowca"),
        ),
        (
            "Wołowinę pokrój w kostkę, obsmaż i duś pod przykryciem {d:minuta}.",
            "Dodaj posiekaną kapustę, jałowiec i tyle wody, żeby nic nie przywarło.",
            "Kiełbasę podsmaż osobno i wrzuć do garnka razem ze śliwkami.",
            "Duś na najmniejszym ogniu jeszcze {d2:minuta}, mieszając drewnianą łyżką.",
            "Odstaw do jutra i podgrzej ponownie: bigos, tak jak juhas, musi się przespać.",
        ),
    ),
    (
        "placki ziemniaczane",
        (("gram", 500, " ziemniaków"), ("cebula", 1, ""), ("jajko", 1, ""), ("łyżka", 2, " mąki")),
        (
            "Ziemniaki i cebulę zetrzyj na drobnej tarce, a palce zabierz w porę.",
            "Odcedź masę na sicie przez {s:minuta} i zostaw skrobię, która osiadła na dnie.",
            "Wymieszaj wszystko z mąką, solą i jajkiem, "
            "aż ciasto będzie gęste jak mgła na reglach.",
            "Smaż cienkie placki na złoto, po {s2:minuta} z każdej strony.",
            "Podawaj natychmiast, bo placek czeka krócej niż autobus.",
        ),
    ),
    (
        "racuchy z jabłkami",
        (
            ("gram", 200, " mąki"),
            ("mililitr", 150, " maślanki"),
            ("jajko", 1, ""),
            ("jabłko", 1, ""),
            ("łyżka", 1, " cukru"),
        ),
        (
            "Maślankę ubij z cukrem i jajkiem, a potem wsyp mąkę.",
            "Odstaw ciasto na {d:minuta} blisko pieca, ale dalej od Misia.",
            "Jabłko obierz, pokrój w plasterki i wmieszaj do ciasta.",
            "Kładź łyżką na rozgrzany tłuszcz i smaż po {s:minuta} z każdej strony.",
            "Posyp cukrem pudrem tak, jak pierwszy śnieg posypuje Gorce.",
        ),
    ),
    (
        "krupnik z hali",
        (
            ("gram", 80, " kaszy jęczmiennej"),
            ("gram", 200, " ziemniaków"),
            ("marchewka", 1, ""),
            ("litr", 1, " wywaru"),
            ("grzyb", 3, ""),
        ),
        (
            "Grzyby namocz w letniej wodzie, najlepiej poprzedniego wieczoru.",
            "Kaszę opłucz, wsyp do wywaru i gotuj {d:minuta}, co chwilę mieszając.",
            "Dorzuć ziemniaki, marchewkę i pokrojone grzyby razem z wodą spod nich.",
            "Po kolejnych {d2} minutach sprawdź, czy łyżka stoi; jeśli stoi, gotowe.",
            "Posyp natką i postaw na środku stołu, żeby każdy miał równie daleko.",
        ),
    ),
    (
        "niedzielny rosół",
        (
            ("gram", 400, " kurczaka"),
            ("marchewka", 2, ""),
            ("pietruszka", 1, ""),
            ("cebula", 1, ""),
            ("ziarno", 5, " pieprzu"),
        ),
        (
            "Mięso zalej zimną wodą, zagotuj i zbierz pianę.",
            "Cebulę opal nad ogniem, aż sczernieje z jednej strony.",
            "Dołóż warzywa i pieprz, a potem gotuj na tyle wolno, by tylko mrugało, przez "
            "{d:minuta}.",
            "Posól pod koniec i odstaw na {s:minuta}, niech się sklaruje.",
            "Przecedź i podaj z makaronem; śpiewanie przy nalewaniu jest dozwolone.",
        ),
    ),
    (
        "oscypek z rusztu",
        (("oscypek", 1, ""), ("łyżka", 2, " konfitury z żurawiny"), ("kromka", 2, " chleba")),
        (
            "Rozpal ogień i poczekaj {d:minuta}, aż zostanie sam żar.",
            "Ser pokrój w plastry grube na palec juhasa, nie na palec turysty.",
            "Układaj plastry na ruszcie i piecz po {s:minuta} z każdej strony.",
            "Chleb opiecz obok, pilnując, żeby nie zwęglił się z tęsknoty.",
            "Nałóż żurawinę i jedz od razu, patrząc w stronę Tatr.",
        ),
    ),
)

TIPS = (
    "Rada bacy: kto sypie sól z wysoka, ten trafia w garnek dopiero za {n}. razem.",
    "Rada Misia: łyżek miodu może być nawet {n}, byle żadna nie trafiła na futro.",
    "Wersja postna: mięso zamień na grzyby, a narzekanie na ciszę.",
    "Na halny pomaga pokrywka: bez niej zapach ucieka aż {m:metr} od chałupy.",
    "Jeśli {kto} pyta o tajny składnik, odpowiadaj, że to cierpliwość.",
    "Kto zagląda do garnka częściej niż co {m:minuta}, ten zmywa.",
    "Do popicia najlepsza jest herbata z sokiem malinowym, w kubku bez ucha.",
    "Ostatnią porcję zostaw na parapecie; {kto} na pewno tędy wróci.",
    "Garnek wyszoruj piaskiem z potoku, a łyżkę oddaj {komu}.",
)

# Where to (nominative, genitive) and the stops on the way.
ROUTES = (
    ("Zakopane", "Zakopanego", ("Szaflary", "Biały Dunajec", "Poronin")),
    ("Białka Tatrzańska", "Białki Tatrzańskiej", ("Gronków", "Groń")),
    ("Bukowina Tatrzańska", "Bukowiny Tatrzańskiej", ("Gronków", "Białka Tatrzańska")),
    ("Szczawnica", "Szczawnicy", ("Łopuszna", "Dębno", "Krościenko")),
    ("Czarny Dunajec", "Czarnego Dunajca", ("Ludźmierz", "Krauszów")),
    ("Rabka-Zdrój", "Rabki-Zdroju", ("Klikuszowa", "Rdzawka", "Chabówka")),
    ("Jabłonka", "Jabłonki", ("Ludźmierz", "Czarny Dunajec", "Piekielnik")),
    ("Niedzica", "Niedzicy", ("Dębno", "Frydman", "Falsztyn")),
    ("Chochołów", "Chochołowa", ("Ludźmierz", "Czarny Dunajec", "Podczerwone")),
    ("Ochotnica Dolna", "Ochotnicy Dolnej", ("Harklowa", "Krościenko", "Tylmanowa")),
)

BUS_NOTES = (
    "Gdy halny przekroczy {w} km/h, kierowca jedzie wolniej, za to śpiewa głośniej.",
    "Owce przewozi się na tylnej platformie, najwyżej {n:owca} na raz.",
    "Bagaż powyżej {m} kg jedzie na dachu, a jego właściciel trzyma kciuki.",
    "Kierowca czeka na spóźnialskich {n:minuta}, potem już na nikogo.",
    "W razie zaspy pasażerowie pchają, a bilet tanieje o {drobne}.",
    "Kto wiezie gorący żurek, siada z przodu i hamuje razem z kierowcą.",
    "Zgubiony kapelusz z piórkiem odbiera się w kasie numer {n}, codziennie od {rano}.",
    "Miś jeździ za darmo, lecz musi kasować bilet łapą.",
    "Na przystanku w środku lasu autobus staje tylko na machnięcie ciupagą.",
    "{Kto} zostawił{a} w autobusie {n:dzwonek}; są do odebrania u dyżurnego.",
)

# What is sold: the noun that inflects, the rest of the name, price range in grosze.
