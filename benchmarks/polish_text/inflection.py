"""Polish numbers: a count with its noun in the right form, the time of day.

Knows no sentence and no chance. Cases: the forms are those after a number in the nominative or
accusative; a feminine noun after 1 in the accusative ("1 owcę") is not among them, so such
sentences start at 2.
"""

from __future__ import annotations

# One, few, many: after 1; after 2, 3, 4, 22, 23 ...; after everything else.
_TABLE = """
złoty|złote|złotych grosz|grosze|groszy minuta|minuty|minut dzień|dni|dni stopień|stopnie|stopni
gram|gramy|gramów mililitr|mililitry|mililitrów litr|litry|litrów porcja|porcje|porcji
łyżka|łyżki|łyżek łyżeczka|łyżeczki|łyżeczek szczypta|szczypty|szczypt ząbek|ząbki|ząbków
jajko|jajka|jajek cebula|cebule|cebul marchewka|marchewki|marchewek jabłko|jabłka|jabłek
pietruszka|pietruszki|pietruszek ziarno|ziarna|ziaren kromka|kromki|kromek śliwka|śliwki|śliwek
grzyb|grzyby|grzybów oscypek|oscypki|oscypków moskol|moskole|moskoli kubek|kubki|kubków
owca|owce|owiec kłoda|kłody|kłód szczapa|szczapy|szczap para|pary|par bilet|bilety|biletów
ulgowy|ulgowe|ulgowych normalny|normalne|normalnych pasła|pasły|pasło została|zostały|zostało
wyjdzie|wyjdą|wyjdzie osoba|osoby|osób łyk|łyki|łyków raz|razy|razy krok|kroki|kroków
czapka|czapki|czapek dzwonek|dzwonki|dzwonków metr|metry|metrów godzina|godziny|godzin
słoik|słoiki|słoików bochenek|bochenki|bochenków pocztówka|pocztówki|pocztówek
gwizdek|gwizdki|gwizdków drożdżówka|drożdżówki|drożdżówek tabliczka|tabliczki|tabliczek
paczka|paczki|paczek butelka|butelki|butelek latarka|latarki|latarek kawałek|kawałki|kawałków
koc|koce|koców
"""
FORMS = {forms.partition("|")[0]: tuple(forms.split("|")) for forms in _TABLE.split()}


class Count(int):
    """A number that brings its noun along in the right form: f"{Count(5):jajko}" is "5 jajek"."""

    def __format__(self, word: str) -> str:
        if not word:
            return str(int(self))
        one, few, many = FORMS[word.lstrip("!")]
        is_few = self % 10 in (2, 3, 4) and self % 100 not in (12, 13, 14)
        if self == 1:
            form = one
        else:
            form = few if is_few else many
        return form if word.startswith("!") else f"{int(self)} {form}"


class Time(int):
    """Minutes after midnight, shown as "6:05"."""

    def __format__(self, _: str) -> str:
        return f"{self // 60}:{self % 60:02d}"
