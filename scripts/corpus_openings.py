"""The openings from which the model writes the embedded corpus, and the words that fill them.

OPENINGS maps a kind of text to two tuples: beginnings that the model continues as plain text, and
instructions that it answers as an assistant. Opening number i of a kind, counted over both tuples, is the
group "kind/i" of every document that begins with it. A name in braces is a slot: it stands for a word of
SLOTS, or for a number of NUMBERS, drawn anew for every document.
"""

import random
import re

_SLOTS = """
name: Anna, Ben, Clara, David, Elena, Farid, Grace, Hugo, Ines, Jonas, Kira, Liam, Maya, Nora, Omar, Priya, Ruth, Sam,
  Tara, Victor
friend: Alice, Bruno, Chen, Daria, Emil, Fiona, George, Hana, Ivan, Julia, Karl, Lucy, Mark, Nina, Oscar, Paula, Rosa,
  Simon
animal: dog, cat, horse, fox, owl, rabbit, bear, wolf, crow, goat, tiger, whale, turtle, mouse, duck, lion, bee,
  spider
animals: dogs, cats, horses, foxes, owls, rabbits, bears, wolves, crows, goats, tigers, whales, turtles, ants, ducks,
  lions
place: library, harbour, market, school, village, forest, museum, hospital, station, farm, kitchen, garden, bakery,
  castle
object: key, lamp, letter, clock, bicycle, mirror, map, violin, book, coat, boat, camera, ladder, radio, ring, box
objects: keys, lamps, letters, clocks, bicycles, mirrors, maps, books, coats, boats, cameras, ladders, coins, boxes
job: teacher, doctor, farmer, baker, pilot, nurse, lawyer, painter, sailor, engineer, judge, writer, singer, gardener
jobs: teachers, doctors, farmers, bakers, pilots, nurses, lawyers, painters, sailors, engineers, judges, writers
food: bread, soup, pancakes, rice, apple pie, tomato sauce, cheese, curry, salad, noodles, coffee, chocolate
fruit: apples, oranges, pears, lemons, plums, peaches, bananas, cherries, melons, figs
country: France, Japan, Brazil, Egypt, Canada, India, Norway, Kenya, Mexico, Poland, Vietnam, Peru, Turkey, Greece,
  Chile, Spain
city: London, Tokyo, Cairo, Rome, Lima, Paris, Berlin, Delhi, Madrid, Athens, Moscow, Boston, Sydney, Nairobi, Lisbon
river: Nile, Amazon, Danube, Rhine, Ganges, Mississippi, Thames, Yangtze, Volga, Congo
region: the Alps, the Sahara, Siberia, the Andes, the Arctic, Southeast Asia, West Africa, the Mediterranean
empire: the Roman Empire, the Ottoman Empire, ancient Egypt, the Mongol Empire, ancient Greece, the Inca Empire
event: the French Revolution, the First World War, the Industrial Revolution, the Black Death, the Cold War, the
  Renaissance, the American Civil War, the fall of the Berlin Wall, the Space Race
invention: the printing press, the steam engine, the telephone, the light bulb, the aeroplane, the compass, the
  microscope, the computer, the radio, paper
person: Marie Curie, Isaac Newton, Leonardo da Vinci, Nelson Mandela, Albert Einstein, Cleopatra, Mozart, William
  Shakespeare, Ada Lovelace, Mahatma Gandhi, Charles Darwin, Frida Kahlo, Galileo Galilei, Joan of Arc
science: gravity, photosynthesis, magnetism, evolution, electricity, sound waves, the water cycle, friction, DNA,
  vaccines, volcanoes, the immune system, plate tectonics, batteries
planet: Mercury, Venus, Mars, Jupiter, Saturn, Uranus, Neptune
body: heart, brain, lungs, liver, skin, eyes, stomach, bones
substance: water, iron, oxygen, salt, carbon, gold, glass, wood, copper, hydrogen
season: spring, summer, autumn, winter
weather: rain, snow, fog, wind, heat, thunder, frost, sunshine
feeling: happy, angry, tired, afraid, proud, lonely, curious, surprised, calm, jealous
subject: mathematics, history, music, chemistry, geography, painting, economics, philosophy, biology
sport: football, tennis, swimming, running, cycling, chess, basketball, sailing
sense: a noise in the night, a strange smell, a light on the hill, a voice behind the door
century: twelfth, thirteenth, fourteenth, fifteenth, sixteenth, seventeenth, eighteenth, nineteenth, twentieth
weekday: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
month: January, March, April, June, July, September, October, December
"""
SLOTS = {
    slot: " ".join(words.split()).split(", ")
    for slot, words in (entry.split(": ") for entry in re.split(r"\n(?! )", _SLOTS.strip()))
}

NUMBERS = dict(n=(2, 12), m=(3, 30), k=(12, 99), h=(100, 950), year=(1105, 2015))

OPENINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = dict(
    reasoning=(
        (
            "Let us think step by step. If every {animal} in the {place} is black, then",
            "There are two reasons to doubt that the {object} was stolen. First,",
            "{name} is taller than {friend}, and {friend} is taller than the {job}. Therefore",
            "The problem was this: {jobs} wanted shorter days, but the {place} needed them longer. One solution",
            "It cannot be both {weather} and dry at the same time. So when {name} came home",
        ),
        (
            "{name} sits left of {friend}, and the {job} sits right of {friend}. Who sits in the middle? "
            "Explain step by step.",
            "All {animals} can run. Rex is one of them. Can Rex run? Give your reasoning in numbered steps.",
            "Why might a {job} refuse to sell a {object} at a low price? Reason step by step.",
            "The {place} is closed on {weekday}. {name} wants to go there the day before. Which day is it? "
            "Think step by step.",
            "Give one argument for and one argument against teaching {subject} to every child.",
            "What would happen if all {animals} disappeared? Think about causes and effects, one after the other.",
            "Find the mistake in this argument: some {jobs} are rich, {name} is rich, so {name} is one of the {jobs}.",
        ),
    ),
    arithmetic=(
        (
            "{n} + {m} =",
            "Question: {name} has {k} {fruit} and gives away {n}. How many are left? Answer:",
            "To multiply {k} by {n}, we first",
            "The sum of {k} and {m} is",
            "Exercise 1. A {job} earns {h} dollars a week. After {n} weeks",
        ),
        (
            "What is {k} plus {m}? Show your work.",
            "{name} buys {n} boxes with {m} {objects} each. How many {objects} is that? Explain each step.",
            "A train travels {k} kilometres per hour for {n} hours. How far does it go? Show the calculation.",
            "What is {h} divided by {n}? Explain how to do the long division.",
            "Write five addition problems with numbers below twenty, and give the answer of each.",
            "{name} is {m} years old and {friend} is {n} years older. How old will both be in ten years?",
            "Explain to a child what {n} percent of {h} means, and work it out.",
        ),
    ),
    story=(
        (
            "Once upon a time, in a small {place} by the sea, there lived a {animal} who",
            "The {job} had not opened the {object} for twenty years.",
            '"Do not go into the {place}," the old woman said to {name}.',
            "On the last day of {season}, {name} and {friend}",
            "It was {sense} that woke {name} at three in the morning.",
            "Nobody in {city} remembered the name of the {job}, but",
            "The {weather} did not stop for nine days, and the people of the village",
        ),
        (
            "Write a short story about a {animal} who finds a {object}.",
            "Tell me a story in which {name} the {job} feels {feeling} at first, and brave at the end.",
            "Write the first paragraph of a mystery novel set in a {place} in {city}.",
            "Write a bedtime story about a {job} and two {animals}.",
            "Tell a funny story about {name}, who forgot the {food} on the stove.",
        ),
    ),
    dialogue=(
        (
            "Teacher: Good morning, {name}. What did you learn about {subject}?\n{name}:",
            '"I never wanted to be a {job}," said {name}. "',
            "{name}: Where did you put the {object}?\n{friend}:",
            "Customer: How much are the {fruit} today?\nSeller:",
            "Interviewer: You have worked as a {job} for {m} years. What has changed?\n{name}:",
            '"Is it far to {city}?" asked the {job}.\n"',
        ),
        (
            "Write a conversation between {name} and {friend} about {food}.",
            "Write a dialogue in which a {job} explains to a child why {animals} sleep.",
            "Write a phone call: {name} wants to book a table for {n} people on {weekday}.",
            "Hello! I feel {feeling} today because of my {subject} exam. What should I do?",
            "Write a short argument between two {jobs} about the {weather}, and let them make peace.",
            "Can you recommend a {sport} club for my daughter? She is {n} years old.",
        ),
    ),
    geography=(
        (
            "{country} is a country that borders",
            "The river {river} rises in",
            "The climate of {region} is",
            "The capital of {country} is a city of",
            "Travellers who reach {city} by ship first see",
            "Most people in {country} live in",
        ),
        (
            "Describe the landscape of {country} in one paragraph.",
            "What are the main exports of {country}, and why?",
            "Compare the cities of {city} and Vienna.",
            "Why is the river {river} important for the people who live near it?",
            "What should a visitor see in {city} in {n} days?",
            "How do people live in {region}?",
        ),
    ),
    history=(
        (
            "In the {century} century, most people in {country}",
            "The causes of {event} were",
            "Historians disagree about {empire}. Some of them",
            "The king of {country} died without an heir, and",
            "Before {invention} was invented, people",
            "The war between the two kingdoms began when",
        ),
        (
            "Summarise {event} in a few sentences.",
            "How did {invention} change the world?",
            "What was daily life like for {jobs} in {empire}?",
            "Explain how {empire} came to an end.",
            "What can we learn today from {event}?",
            "Tell me about trade between {country} and its neighbours in the {century} century.",
        ),
    ),
    science=(
        (
            "{planet} is one of the planets of the solar system. It",
            "When {substance} is heated, its molecules",
            "The human {body} and its work:",
            "Scientists study {animals} because",
            "In this experiment we measured how {substance}",
            "The theory behind {science} was first",
        ),
        (
            "Explain {science} to a ten-year-old.",
            "What is the difference between a planet and a star? Use {planet} as an example.",
            "What are the properties of {substance}?",
            "How do {animals} survive in {season}?",
            "Why is the sky blue, and what does it have to do with {weather}?",
            "Describe an experiment about {science} that can be done at home.",
        ),
    ),
    people=(
        (
            "{person} was born in",
            "{name} Miller (born {year}) was a {job} who",
            "The life of {person} shows that",
            "My grandmother was a {job} in {country}. She",
            "Dear {name}, I am writing to you from {city}, where",
            "Among the {jobs} of {city}, none was as famous as",
        ),
        (
            "Who was {person}? Answer in one paragraph.",
            "Describe a typical day in the life of a {job}.",
            "Write a short biography of an imagined {job} from {country}.",
            "What is {person} best known for, and what happened afterwards?",
            "Write a letter from {name} to {friend} about moving to {city}.",
            "Write a polite e-mail in which {name} asks the {job} for help with {subject}.",
        ),
    ),
    sentence=(
        (
            "The {objects} on the table are old. The {object} beside them is",
            "The {job} near the {animals} was",
            "The {jobs} in the {place} were",
            "Many {animals} sleep during the day. One {animal}",
            "She likes the {object}. They like the {objects}. We",
            "Neither the {job} nor the {jobs}",
            "Every {animal} has",
        ),
        (
            "Write eight short sentences about {animals}. Use the plural.",
            "Write eight short sentences about one {object}. Use simple words.",
            "Use each of these words in a sentence: {object}, {weather}, {job}, {feeling}.",
            "Rewrite in the plural, and add three sentences of the same sort: The {animal} sees the {object}.",
            "Describe a {place} in {season} with plain sentences in the present tense.",
        ),
    ),
    year=(
        (
            "The war lasted from the year {year} to the year",
            "In {year}, the town of",
            "The {century} century began with",
            "Timeline of {country}:\n{year}:",
            "{month} {n}, {year}. Today the {jobs}",
            "The {place} was built in {year} and",
        ),
        (
            "What happened in Europe around {year}?",
            "Make a timeline with five dates in the history of {invention}.",
            "{name} was born in {year} and lived for {k} years. In which year did {name} die? Explain.",
            "Which century does the year {year} belong to? Explain the rule with other examples.",
            "Write a diary entry of a {job}, dated {month} {year}.",
            "Imagine {city} in the year 2150. What is different?",
        ),
    ),
    list=(
        (
            "Shopping list for {weekday}:\n- {food}\n-",
            "Things to pack for a journey to {city}:\n1.",
            "Ten facts about {animals}:\n1.",
            "Countries that {name} has visited: {country},",
            "The five parts of the course in {subject} are:",
            "Colours: red, blue, green. Animals: {animal},",
        ),
        (
            "List six {animals} or other animals, with one fact about each.",
            "Give me a list of {n} ideas for a birthday party in {season}.",
            "List the advantages and disadvantages of working as a {job}.",
            "Name five books about {subject} and say what each is about.",
            "List the ingredients of {food}, with amounts.",
            "Give five words that rhyme with 'light' and five that have to do with {weather}.",
        ),
    ),
    howto=(
        (
            "How to repair a {object}. First,",
            "To make {food}, you need",
            "A guide to {sport} for beginners\n\n",
            "Before you paint the {place}, make sure that",
            "Step 1: Open the {object}. Step 2:",
            "If you want to learn {subject}, start with",
        ),
        (
            "How do I cook {food}?",
            "How can I take care of {animals} at home?",
            "Explain how to clean a {object}, step by step.",
            "How does one become a {job}?",
            "Give me advice on how to fall asleep in the {weather}.",
            "How do I prepare for a {sport} competition in {n} weeks?",
        ),
    ),
)


def numbered() -> list[tuple[str, str, bool]]:
    """Every opening as (group, text with slots, whether it is an instruction)."""
    return [
        (f"{kind}/{number}", text, is_instruction)
        for kind, (beginnings, instructions) in OPENINGS.items()
        for number, (text, is_instruction) in enumerate(
            [(text, False) for text in beginnings] + [(text, True) for text in instructions]
        )
    ]


def fill(text: str, rng: random.Random) -> str:
    """Return the opening with its slots filled, and "a" before a vowel made "an"."""
    words = {slot: rng.choice(choices) for slot, choices in SLOTS.items()}
    numbers = {slot: rng.randint(low, high) for slot, (low, high) in NUMBERS.items()}
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text.format(**words, **numbers))
