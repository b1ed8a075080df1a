"""Worked examples that stand before a benchmark's questions, in the form of its items.

All were written for this project; none is taken from a benchmark. Tests work the answers out again.
"""

# Question and worked solution, in the form of gsm8k: every calculation is repeated between << and >>.
GSM8K = (
    (
        "A potter makes 6 bowls on Monday and twice as many on Tuesday. She packs them into crates of 3. How many "
        "crates does she fill?",
        "On Tuesday she makes 6 * 2 = <<6*2=12>>12 bowls.\n"
        "Together that is 6 + 12 = <<6+12=18>>18 bowls.\n"
        "They fill 18 / 3 = <<18/3=6>>6 crates.\n"
        "#### 6",
    ),
    (
        "Tickets for the harbour ferry cost $4 for adults and half of that for children. What does the trip cost for 2 "
        "adults and 5 children, in dollars?",
        "A child's ticket costs 4 / 2 = $<<4/2=2>>2.\n"
        "The adults pay 2 * 4 = $<<2*4=8>>8.\n"
        "The children pay 5 * 2 = $<<5*2=10>>10.\n"
        "The trip costs 8 + 10 = $<<8+10=18>>18.\n"
        "#### 18",
    ),
    (
        "Ilse reads 25 pages a day. Her book has 340 pages and she has already read 90. In how many days will she "
        "finish it?",
        "There are 340 - 90 = <<340-90=250>>250 pages left.\nShe needs 250 / 25 = <<250/25=10>>10 days.\n#### 10",
    ),
    (
        "A bakery sold 120 rolls in the morning and 25% fewer in the afternoon. How many rolls did it sell that day?",
        "25% of 120 is 120 * 0.25 = <<120*0.25=30>>30 rolls.\n"
        "In the afternoon it sold 120 - 30 = <<120-30=90>>90 rolls.\n"
        "That day it sold 120 + 90 = <<120+90=210>>210 rolls.\n"
        "#### 210",
    ),
    (
        "Tariq saves 15 coins each week. His sister saves 4 coins a week more than he does. How many coins have they "
        "saved together after 8 weeks?",
        "His sister saves 15 + 4 = <<15+4=19>>19 coins a week.\n"
        "Together they save 15 + 19 = <<15+19=34>>34 coins a week.\n"
        "After 8 weeks they have 34 * 8 = <<34*8=272>>272 coins.\n"
        "#### 272",
    ),
    (
        "A water tank holds 900 litres. A pump fills it with 60 litres a minute while 15 litres a minute leak out. How "
        "many minutes does it take to fill the empty tank?",
        "Each minute the tank gains 60 - 15 = <<60-15=45>>45 litres.\n"
        "Filling it takes 900 / 45 = <<900/45=20>>20 minutes.\n"
        "#### 20",
    ),
    (
        "Three friends share a bill of $57 and a tip of $9 equally. How many dollars does each of them pay?",
        "With the tip the bill is 57 + 9 = $<<57+9=66>>66.\nEach pays 66 / 3 = $<<66/3=22>>22.\n#### 22",
    ),
    (
        "An orchard has 14 rows of 12 trees. After a storm 35 trees are gone. Each tree left gives 20 kilograms of "
        "apples. How many kilograms is that in all?",
        "The orchard had 14 * 12 = <<14*12=168>>168 trees.\n"
        "There are 168 - 35 = <<168-35=133>>133 left.\n"
        "They give 133 * 20 = <<133*20=2660>>2660 kilograms.\n"
        "#### 2660",
    ),
)

# Problem and solution, in the form of MATH.
MATH = (
    (
        r"Find the positive solution of $x^2 - 3x = 28$.",
        r"The equation is $x^2 - 3x - 28 = 0$, and the left side factors as $(x - 7)(x + 4)$. So $x = 7$ or $x = -4$, "
        r"and the positive solution is $\boxed{7}$.",
    ),
    (
        r"Two fair coins and one fair six-sided die are thrown. What is the probability that both coins show heads and "
        r"the die shows a number below 3?",
        r"Both coins show heads with probability $\frac{1}{2} \cdot \frac{1}{2} = \frac{1}{4}$. The die shows $1$ or "
        r"$2$ with probability $\frac{2}{6} = \frac{1}{3}$. The throws do not depend on each other, so the probability "
        r"is $\frac{1}{4} \cdot \frac{1}{3} = \boxed{\frac{1}{12}}$.",
    ),
    (
        r"A right triangle has legs of length $\sqrt{5}$ and $2\sqrt{5}$. How long is its hypotenuse?",
        r"By the theorem of Pythagoras its square is $(\sqrt{5})^2 + (2\sqrt{5})^2 = 5 + 20 = 25$. The hypotenuse has "
        r"length $\boxed{5}$.",
    ),
    (
        r"What is the remainder when $2^{10}$ is divided by $7$?",
        r"Since $2^3 = 8$ leaves the remainder $1$ when divided by $7$, so does $2^9 = (2^3)^3$. Hence "
        r"$2^{10} = 2 \cdot 2^9$ leaves the remainder $\boxed{2}$.",
    ),
    (
        r"Simplify $\frac{a^2 - 9}{a + 3} + 2a$ for $a \ne -3$.",
        r"The numerator is $(a - 3)(a + 3)$, so the fraction equals $a - 3$. Adding $2a$ gives $\boxed{3a - 3}$.",
    ),
)

# Question and right choice, of each task of logic, in the form of BIG-Bench Hard.
LOGIC = {
    "logical_deduction_three_objects": (
        (
            "Three jars stand on a shelf, side by side: a jar of honey, a jar of salt, and a jar of rice. The jar of "
            "rice is to the left of the jar of salt. The jar of honey is to the right of the jar of salt.\n"
            "Options:\n"
            "(A) The jar of honey is the leftmost\n"
            "(B) The jar of salt is the leftmost\n"
            "(C) The jar of rice is the leftmost",
            "(C)",
        ),
        (
            "Three runners finished a race, none at the same time: Olga, Piet, and Rana. Piet finished before Olga. "
            "Rana finished after Piet and before Olga.\n"
            "Options:\n"
            "(A) Olga finished second\n"
            "(B) Piet finished second\n"
            "(C) Rana finished second",
            "(C)",
        ),
        (
            "Three lamps have different prices: a desk lamp, a floor lamp, and a wall lamp. The floor lamp is the most "
            "expensive. The wall lamp costs more than the desk lamp.\n"
            "Options:\n"
            "(A) The desk lamp is the cheapest\n"
            "(B) The floor lamp is the cheapest\n"
            "(C) The wall lamp is the cheapest",
            "(A)",
        ),
    ),
    "logical_deduction_five_objects": (
        (
            "Five books stand on a shelf, side by side: a red one, a blue one, a green one, a white one, and a black "
            "one. The white book is the leftmost. The black book is the rightmost. The red book is directly to the "
            "right of the white book. The green book is to the left of the blue book.\n"
            "Options:\n"
            "(A) The red book is the third from the left\n"
            "(B) The blue book is the third from the left\n"
            "(C) The green book is the third from the left\n"
            "(D) The white book is the third from the left\n"
            "(E) The black book is the third from the left",
            "(C)",
        ),
        (
            "Five boats finished a race, none at the same time: the Heron, the Otter, the Swift, the Tern, and the "
            "Wren. The Tern finished second. The Heron finished last. The Wren finished before the Tern. The Otter "
            "finished after the Swift.\n"
            "Options:\n"
            "(A) The Heron finished fourth\n"
            "(B) The Otter finished fourth\n"
            "(C) The Swift finished fourth\n"
            "(D) The Tern finished fourth\n"
            "(E) The Wren finished fourth",
            "(B)",
        ),
        (
            "Five cheeses have different prices: Brie, Cheddar, Edam, Feta, and Gouda. Edam is the most expensive. "
            "Feta is the cheapest. Brie costs more than Cheddar. Gouda costs more than Brie.\n"
            "Options:\n"
            "(A) Brie is the second most expensive\n"
            "(B) Cheddar is the second most expensive\n"
            "(C) Edam is the second most expensive\n"
            "(D) Feta is the second most expensive\n"
            "(E) Gouda is the second most expensive",
            "(E)",
        ),
    ),
    "logical_deduction_seven_objects": (
        (
            "Seven pots stand on a sill, side by side: basil, chives, dill, mint, parsley, sage, and thyme. The mint "
            "is the leftmost. The thyme is the rightmost. The sage is the fourth from the left. The basil is directly "
            "to the right of the mint. The dill is directly to the left of the sage. The chives are to the left of the "
            "parsley.\n"
            "Options:\n"
            "(A) The basil is the fifth from the left\n"
            "(B) The chives are the fifth from the left\n"
            "(C) The dill is the fifth from the left\n"
            "(D) The mint is the fifth from the left\n"
            "(E) The parsley is the fifth from the left\n"
            "(F) The sage is the fifth from the left\n"
            "(G) The thyme is the fifth from the left",
            "(B)",
        ),
        (
            "Seven skiers finished a race, none at the same time: Ada, Bo, Cleo, Dirk, Enzo, Fay, and Gus. Cleo "
            "finished first. Gus finished last. Dirk finished third. Fay finished directly before Dirk. Ada finished "
            "sixth. Enzo finished before Bo.\n"
            "Options:\n"
            "(A) Ada finished fifth\n"
            "(B) Bo finished fifth\n"
            "(C) Cleo finished fifth\n"
            "(D) Dirk finished fifth\n"
            "(E) Enzo finished fifth\n"
            "(F) Fay finished fifth\n"
            "(G) Gus finished fifth",
            "(B)",
        ),
        (
            "Seven towers have different heights: the Ash, the Birch, the Cedar, the Fir, the Larch, the Oak, and the "
            "Pine tower. The Oak tower is the highest. The Fir tower is the lowest. The Cedar tower is higher than the "
            "Ash tower. The Ash tower is higher than the Pine tower. The Pine tower is higher than the Birch tower. "
            "The Birch tower is higher than the Larch tower.\n"
            "Options:\n"
            "(A) The Ash tower is the second highest\n"
            "(B) The Birch tower is the second highest\n"
            "(C) The Cedar tower is the second highest\n"
            "(D) The Fir tower is the second highest\n"
            "(E) The Larch tower is the second highest\n"
            "(F) The Oak tower is the second highest\n"
            "(G) The Pine tower is the second highest",
            "(C)",
        ),
    ),
    "boolean_expressions": (
        ("( False or not False ) and ( True and not False ) is", "True"),
        ("not ( True or False ) or not not False is", "False"),
        ("True and not ( False or True ) or not False and True is", "True"),
    ),
    "web_of_lies": (
        (
            "Question: Marta lies. Jonas says Marta tells the truth. Akira says Jonas lies. Leila says Akira tells the "
            "truth. Petra says Leila lies. Does Petra tell the truth?",
            "No",
        ),
        (
            "Question: Samir tells the truth. Greta says Samir lies. Hugo says Greta lies. Noor says Hugo tells the "
            "truth. Emil says Noor tells the truth. Does Emil tell the truth?",
            "Yes",
        ),
        (
            "Question: Tessa lies. Ravi says Tessa lies. Ines says Ravi tells the truth. Olek says Ines lies. Mina "
            "says Olek tells the truth. Does Mina tell the truth?",
            "No",
        ),
    ),
    "date_understanding": (
        (
            "The meeting was moved by two days to Friday, 03/17/2023. On what date should it have been held, before it "
            "was put off, in MM/DD/YYYY?\n"
            "Options:\n"
            "(A) 03/15/2023\n"
            "(B) 03/19/2023\n"
            "(C) 03/16/2023\n"
            "(D) 02/15/2023\n"
            "(E) 03/15/2022",
            "(A)",
        ),
        (
            "Today is the last day of January 2001. What is the date a week from today in MM/DD/YYYY?\n"
            "Options:\n"
            "(A) 02/06/2001\n"
            "(B) 01/24/2001\n"
            "(C) 02/07/2001\n"
            "(D) 02/08/2001\n"
            "(E) 02/07/2000",
            "(C)",
        ),
        (
            "Lena planted the tree on 06/10/1998, ten years ago today. What was the date yesterday in MM/DD/YYYY?\n"
            "Options:\n"
            "(A) 06/11/2008\n"
            "(B) 06/09/1998\n"
            "(C) 06/09/2009\n"
            "(D) 06/09/2008\n"
            "(E) 05/09/2008\n"
            "(F) 06/10/2008",
            "(D)",
        ),
    ),
}

# A text, a question and its options, with the right choice.
LOGIQA = (
    (
        "Every ferry that calls at the island carries mail. Some ferries that carry mail also carry bicycles. No ferry "
        "that carries bicycles runs in winter.\n"
        "Which of the following must be true?\n"
        "Options:\n"
        "(A) Every ferry that calls at the island carries bicycles\n"
        "(B) Some ferries that carry mail do not run in winter\n"
        "(C) No ferry that calls at the island runs in winter\n"
        "(D) Every ferry that carries mail calls at the island",
        "(B)",
    ),
    (
        "The town's library lent more books this year than last year, although fewer people have a library card.\n"
        "Which of the following follows?\n"
        "Options:\n"
        "(A) The library bought more books this year\n"
        "(B) Fewer people visited the library this year\n"
        "(C) On average, each holder of a card borrowed more books this year\n"
        "(D) People without a card read more this year",
        "(C)",
    ),
    (
        "If the gate is locked, the alarm is on. The alarm is off.\n"
        "Which of the following must be true?\n"
        "Options:\n"
        "(A) The gate is not locked\n"
        "(B) The gate is locked\n"
        "(C) The alarm is broken\n"
        "(D) The gate cannot be locked",
        "(A)",
    ),
)

# A question and its options, with the right choice.
COMMONSENSE = (
    (
        "Where would you most likely leave wet boots when you come home?\n"
        "Options:\n"
        "(A) bookshelf\n"
        "(B) oven\n"
        "(C) doormat\n"
        "(D) pillow\n"
        "(E) desk drawer",
        "(C)",
    ),
    (
        "The baker wanted the bread to rise, so what did he add to the dough?\n"
        "Options:\n"
        "(A) yeast\n"
        "(B) gravel\n"
        "(C) ice\n"
        "(D) soap\n"
        "(E) paint",
        "(A)",
    ),
    (
        "What does a person who is lost in a city usually look at?\n"
        "Options:\n"
        "(A) a recipe\n"
        "(B) a mirror\n"
        "(C) a calendar\n"
        "(D) a map\n"
        "(E) a menu",
        "(D)",
    ),
)

# The benchmarks of one part, by name.
WORD_PROBLEMS = (
    ("Otto has 12 spoons and finds 5 more. How many spoons does Otto have now?", "12 + 5 = 17"),
    ("All glims are round. All prots are flat. Vera is a prot. What is Vera like?", "flat"),
    ("Vera packs 3 crates with 6 lamps each. How many lamps are in the crates?", "3 * 6 = 18"),
    ("Otto has 15 ropes, gives away 4 and finds 2. How many ropes does Otto have in the end?", "15 - 4 + 2 = 13"),
)

WORKED = dict(gsm8k=GSM8K, math=MATH, logiqa=LOGIQA, commonsense=COMMONSENSE, word_problems=WORD_PROBLEMS)
