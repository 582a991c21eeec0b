"""Write dates as people write them, each with its ISO form, as a TSV for `transformer.py --data`.

  python tests/make_dates.py dates.tsv        30,000 spellings of dates from 1900 to 2099

Dots put the day first and slashes the month, unless the year is in front; a year of two digits
is 1950 to 2049. The facts are those of the calendar alone.
"""

import argparse
import calendar
import datetime
import random

# {d} day, {dd} two digits, {o} 1st; {m} month, {mm} two digits; {M} March, {b} Mar; {y} 2021,
# {yy} 21; {W} Wednesday, {w} Wed.
FORMS = (
    "{d} {M} {y}", "{d} {b} {y}", "{d} {b}. {y}", "{o} {M} {y}", "{o} of {M} {y}", "{d}. {M} {y}",
    "the {o} of {M}, {y}", "{M} {d}, {y}", "{M} {o}, {y}", "{b} {d} {y}", "{b}. {d}, {y}",
    "{W}, {d} {M} {y}", "{W}, {M} {d}, {y}", "{w} {d} {b} {y}", "{w}, {b} {o}, {y}",
    "{W} the {o} of {M} {y}", "{d} {M} '{yy}", "{b} {d} '{yy}", "{d}-{b}-{y}", "{dd}-{b}-{yy}",
    "{d}.{m}.{y}", "{dd}.{mm}.{y}", "{d}.{m}.{yy}", "{d}. {m}. {y}", "{m}/{d}/{y}", "{mm}/{dd}/{y}",
    "{m}/{d}/{yy}", "{y}/{m}/{d}", "{y}/{mm}/{dd}", "{y} {M} {d}", "{y}, {M} {o}", "{y}{mm}{dd}")


def ordinal(day: int) -> str:
    suffix = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def write_date(date, form: str) -> str:
    month, weekday = calendar.month_name[date.month], calendar.day_name[date.weekday()]
    return form.format(
        d=date.day, dd=f"{date.day:02}", o=ordinal(date.day), m=date.month, mm=f"{date.month:02}",
        M=month, b="Sept" if date.month == 9 else month[:3], y=date.year,
        yy=f"{date.year % 100:02}", W=weekday, w=weekday[:3])


def make_dates(count: int, seed: int = 0) -> dict:
    """`count` different spellings, as {spelling: ISO date}."""
    generator, dates = random.Random(seed), {}
    while len(dates) < count:
        form = generator.choice(FORMS)
        years = (1950, 2049) if "{yy}" in form else (1900, 2099)
        first, last = (datetime.date(year, *day).toordinal()
                       for year, day in zip(years, ((1, 1), (12, 31))))
        date = datetime.date.fromordinal(generator.randint(first, last))
        text = write_date(date, form)
        text = generator.choice((text, text, text.lower(), text.upper()))
        if generator.random() < 0.1:
            text = text.replace(",", "")
        dates[text] = date.isoformat()
    return dates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--count", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with open(args.file, "w", encoding="utf-8") as file:
        file.write("source\ttarget\n")
        for text, iso in make_dates(args.count, args.seed).items():
            file.write(f"{text}\t{iso}\n")


if __name__ == "__main__":
    main()
