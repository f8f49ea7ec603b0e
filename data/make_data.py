"""Write tinyld's bundled data: two labelled tasks and one unlabelled corpus.

Every sentence comes from word lists and templates that the tinyld authors wrote (the corpus's are in this
file, the tasks' in reviews/grammar.txt and topics/grammar.txt), so the data carries no third-party text and
can be rebuilt byte for byte (seed 0):

    python data/make_data.py               # writes reviews/, topics/ and corpus.txt.gz beside this file
    python data/make_data.py --baseline    # scores bag-of-words baselines on the two tasks

A template is plain text with slots: "the {cook} burnt the {dish}". A slot is filled from the lexicon entry of
that name, and entries may hold slots themselves. "{tool.s}" asks for a form (here the plural). The two tasks
are built so that single words say little: see `Critic` (reviews) and `Reporter` (topics).
"""

import argparse
import gzip
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SEED = 0
SIZES = {"train": 3000, "dev": 500, "test": 500}
CORPUS_DOCUMENTS = 9600


def parse(block: str) -> dict[str, list[str]]:
    """Read "name: a | b | c" entries; a line that starts with blanks continues the entry above it."""
    entries: dict[str, list[str]] = {}
    for line in re.sub(r"\n[ \t]+", " ", block.strip()).split("\n"):
        name, _, options = line.partition(":")
        entries[name.strip()] = [option.strip() for option in options.split("|") if option.strip()]
    return entries


def sections(text: str) -> dict[str, dict[str, list[str]]]:
    """Read "[section]" lines, each with its entries below it, and skip "#" comments."""
    blocks = re.split(r"(?m)^\[(\w+)\]\n", re.sub(r"(?m)^#.*\n", "", text))[1:]
    return {name: parse(block) for name, block in zip(blocks[::2], blocks[1::2], strict=True)}


DOMAINS = sections((HERE / "reviews" / "grammar.txt").read_text(encoding="utf-8"))
REVIEW_LEX = DOMAINS.pop("polar") | DOMAINS.pop("shared") | DOMAINS.pop("templates")
REVIEW_FORMS = {"direct": 0.2, "denial": 0.24, "contrast": 0.28, "reversal": 0.18, "comparison": 0.1}
TOPICS = sections((HERE / "topics" / "grammar.txt").read_text(encoding="utf-8"))
TOPIC_LEX = TOPICS.pop("shared")
TOPIC_DEVICES = {  # where a topic sentence mentions another topic, and how often
    "none": 0.2,
    "before": 0.16,
    "after": 0.2,
    "past": 0.08,
    "place": 0.08,
    "idiom": 0.06,
    "reason": 0.12,
    "news": 0.1,
}
PLAIN_SHARE = 0.6  # of the clauses in reviews that say it outright rather than deny the opposite

# ---------------------------------------------------------------------------------------------------------
# Corpus: word lists, then one section of templates for each kind of document. A document draws one template
# from every group of its section, in order; {hero}, {friend}, {thing} and {spot} stay the same throughout.
# The option "~" says nothing.
# ---------------------------------------------------------------------------------------------------------

CORPUS = sections("""
[words]
clock: one o'clock | two o'clock | three o'clock | four o'clock | five o'clock | six o'clock | seven o'clock |
    eight o'clock | nine o'clock | ten o'clock | eleven o'clock | noon | half past four | half past seven | a
    quarter to six | a quarter past eight
old_age: thirty | thirty-five | forty | fifty | sixty | sixty-four | seventy | eighty | ninety
pair: boots | gloves | mittens | overalls | sandals | shoes | slippers | socks | trousers | dungarees | braces
side: fresh bread | boiled potatoes | pickles | chutney | a green salad | rice | noodles | toast | mustard
skilled: careful | cheerful | experienced | hard-working | patient | punctual | reliable | sensible | skilled
    | trustworthy
age: five | six | seven | eight | nine | ten | eleven | twelve | thirteen
colour: amber | black | blue | brown | cream | crimson | golden | green | grey | indigo | lemon | orange |
    pink | purple | red | russet | scarlet | turquoise | violet | white | yellow
material: brass | bronze | cardboard | clay | copper | glass | iron | ivory | marble | oak | pewter | pine |
    porcelain | silver | steel | stone | tin | walnut | wicker
box: bowl | box | casket | case | chest | cup | dish | jar | mug | pot | tray | tub | urn
cloth: canvas | corduroy | cotton | denim | flannel | lace | leather | linen | satin | silk | tweed | velvet |
    wool
quality: ancient | battered | beautiful | bent | borrowed | broken | charming | cheap | chipped | clean |
    clever | cracked | crooked | curious | delicate | dented | dusty | elegant | enormous | expensive | faded
    | familiar | famous | fancy | forgotten | fragile | grand | handmade | handsome | hefty | huge | humble |
    large | little | lost | lovely | magnificent | mended | modern | mysterious | neat | new | odd | old |
    ordinary | ornate | painted | patched | peculiar | perfect | plain | polished | precious | pretty |
    priceless | rare | rusty | scratched | secondhand | shabby | shiny | simple | small | spare | splendid |
    stained | stolen | strange | sturdy | superb | tatty | tiny | ugly | unusual | useful | useless | valuable
    | well-worn | wobbly | wonderful | worn
mood: angry | anxious | bitter | blunt | bold | brave | brisk | calm | careful | cautious | cheerful | cold |
    crafty | curious | dreamy | eager | earnest | fierce | firm | frank | gentle | gloomy | graceful |
    grateful | grave | greedy | grim | happy | hasty | helpful | honest | humble | hungry | idle | impatient |
    jealous | kind | lazy | loud | merry | mild | modest | nervous | patient | peaceful | playful | polite |
    proud | quiet | reckless | restless | rude | sad | sensible | serious | silent | sincere | sleepy | slow |
    sober | solemn | stern | stubborn | sweet | tactful | tender | thoughtful | timid | truthful | warm | wary
    | weary | wicked | wise | wistful | witty
feeling: afraid | alone | alert | amazed | amused | angry | annoyed | anxious | ashamed | baffled | bold |
    bored | brave | calm | cheerful | cold | confident | confused | content | curious | delighted | dizzy |
    eager | embarrassed | excited | faint | foolish | fortunate | free | furious | gloomy | grateful | guilty
    | happy | homesick | hopeful | hungry | ill | jealous | lonely | lucky | miserable | nervous | peaceful |
    pleased | proud | puzzled | refreshed | relieved | restless | sad | safe | shy | silly | sleepy | sorry |
    stiff | strong | surprised | thirsty | thrilled | tired | triumphant | uneasy | unwell | useful | warm |
    weak | weary | worried
manner: at once | carefully | cautiously | gently | heavily | in silence | in the dark | lightly | neatly |
    noisily | once again | quickly | quietly | secretly | silently | slowly | softly | steadily | suddenly |
    swiftly | twice | without a word
beast: cat | dog | donkey | fox | goat | goose | hedgehog | hen | kitten | mouse | puppy | rabbit | raven |
    rook | squirrel | stray dog | terrier
body: elbow | knee | shoulder | wrist | thumb | chin | cheek | forehead | ankle | heel | ear | nose | shin |
    toe | little finger
hair: curly hair | long plaits | short dark hair | silver hair | freckles | a crooked smile | bushy eyebrows |
    a loud laugh | a soft voice | cold hands | a quick step | a long stride
hobby: bird-watching | card games | carpentry | chess | crosswords | dancing | drawing | embroidery | fishing
    | gardening | hiking | juggling | kite-flying | knitting | painting | photography | poetry | pottery |
    quilting | reading | riddles | rowing | sailing | sewing | singing | skating | stamp collecting | swimming
    | weaving | whittling
sight: a boat under full sail | a cloud of starlings | a column of smoke | a flock of geese | a girl on a pony
    | a hot-air balloon | a line of washing | a procession of ants | a rainbow | a row of lanterns | a
    shooting star | a ship on the horizon | a snowman | a tame jackdaw | an empty carriage | an old man asleep
    | the first swallow of the year | two men with a ladder
woman: Ada | Agnes | Alice | Amara | Anita | Anya | Beatrix | Bella | Bridget | Carmen | Cecily | Clara | Dana
    | Daphne | Delia | Dora | Edith | Elena | Elsie | Esther | Fatima | Fiona | Flora | Freya | Greta | Hana |
    Hazel | Helga | Ida | Imogen | Ingrid | Irene | Iris | Ivy | Jane | Joan | Judith | June | Kamala | Kitty
    | Lena | Lila | Lucy | Mabel | Maeve | Marta | Matilda | Maya | Mina | Nadia | Nell | Nora | Olga | Olive
    | Petra | Priya | Rosa | Ruth | Sally | Selma | Sofia | Stella | Tamsin | Tessa | Thea | Ursula | Vera |
    Wanda | Yara | Zadie
man: Aaron | Abel | Adil | Alan | Albert | Andrei | Anton | Arthur | Basil | Ben | Boris | Bruno | Callum |
    Carl | Cedric | Cyril | Daniel | David | Dmitri | Duncan | Edgar | Edwin | Eli | Emil | Ernest | Felix |
    Finn | Frank | Fred | Gareth | George | Gilbert | Hamid | Harold | Hector | Henry | Hugo | Ian | Isaac |
    Ivan | Jack | Jacob | Jasper | Jonas | Joseph | Karim | Kenji | Kofi | Lars | Leo | Leonard | Lewis | Luca
    | Magnus | Martin | Milo | Mohan | Ned | Noah | Oscar | Otto | Owen | Pablo | Percy | Piotr | Ralph | Ravi
    | Robin | Samuel | Simon | Stefan | Tariq | Theo | Tom | Victor | Walter | Wilfred | Yusuf
surname: Abbot | Akande | Alder | Archer | Barlow | Baxter | Becker | Birch | Bishop | Bramwell | Carver |
    Chandra | Clay | Cooper | Cotter | Crane | Dalton | Draper | Drummond | Eriksen | Farrow | Fenwick |
    Fletcher | Garner | Glover | Greaves | Halloran | Hargreave | Harper | Hobbs | Ito | Jansen | Kaur |
    Kessler | Lockwood | Marlow | Mason | Mbeki | Mercer | Milner | Moreau | Nadar | Novak | Okafor | Osman |
    Parrish | Pike | Potter | Quill | Ramsay | Reeve | Rossi | Sawyer | Silva | Slater | Sorensen | Tanner |
    Thorne | Tyler | Underhill | Varga | Wainwright | Weaver | Whitlock | Yates
town_start: Ald | Ash | Bar | Birk | Black | Brad | Bramble | Clay | Cold | Cran | Dun | East | Elm | Fair |
    Fern | Glen | Gold | Hart | Hazel | High | Kings | Lang | Long | Mar | Mill | North | Oak | Old | Red |
    Rush | Sand | Stone | Thorn | West | White | Win
town_end: bridge | bury | combe | cross | dale | field | ford | gate | ham | haven | ley | mere | mouth |
    stead | ton | well | wick | wood
object: almanac | alarm clock | anchor | armchair | banner | barrel | barometer | basin | basket | bedspread |
    bellows | bench | bicycle | blanket | bookcase | bottle | bowl | bracelet | briefcase | brooch | bucket |
    button | cabinet | camera | candlestick | carpet | cart | chandelier | chest | clock | coat | compass |
    cradle | cupboard | curtain | cushion | desk | diary | doll | drawer | dresser | earring | easel |
    envelope | flask | fountain pen | frame | gate | globe | hammock | handbag | hat | helmet | jacket | jar |
    jug | kettle | kite | ladder | lamp | lantern | lens | letter | locket | loom | magnet | map | marble |
    mask | mirror | model ship | mug | necklace | needle | newspaper | notebook | paddle | padlock | painting
    | parcel | pendant | photograph | pillow | pipe | pitcher | postcard | pot | puppet | purse | puzzle |
    quilt | radio | ribbon | ring | rocking horse | rope | saddle | satchel | scarf | scrapbook | sculpture |
    shawl | shovel | sketchbook | sledge | spoon | stamp album | stool | suitcase | sundial | table | tapestry
    | teapot | telescope | tent | thimble | ticket | top hat | torch | toy boat | tray | trunk | typewriter |
    umbrella | vase | waistcoat | wallet | wardrobe | watch | weathervane | wheelbarrow | whistle | windmill
place: abbey | allotment | arcade | auction house | bakery | bandstand | bank | barn | beach | boathouse |
    bookshop | bus stop | butcher's | canal | castle | cathedral | cave | chapel | chemist | church | cinema |
    clinic | college | corner shop | cottage | courtyard | crossroads | dairy | dock | factory | fairground |
    farm | fishmonger | florist | forest | forge | fountain | garage | garden | greenhouse | hairdresser |
    hill | hospital | hut | jetty | laboratory | lake | laundry | library | lighthouse | market | meadow |
    mill | monastery | museum | observatory | office | orchard | palace | park | pier | police station | pond
    | post office | pottery | prison | quarry | quay | reservoir | river | ruin | sawmill | school | shed |
    shipyard | stable | stationer | studio | tailor | tavern | temple | theatre | tower | town hall | tunnel |
    university | valley | vineyard | warehouse | waterfall | well | windmill | woodyard | workshop | zoo
tree: alder | ash | aspen | beech | birch | cedar | cherry | chestnut | cypress | elm | fir | hawthorn | hazel
    | holly | larch | lime | magnolia | maple | oak | olive | pine | plane | poplar | rowan | spruce |
    sycamore | walnut | willow | yew
flower: anemone | aster | bluebell | buttercup | camellia | carnation | clover | cornflower | crocus |
    daffodil | dahlia | daisy | foxglove | freesia | geranium | heather | honeysuckle | hyacinth | iris |
    jasmine | lavender | lilac | lily | lupin | marigold | orchid | pansy | peony | petunia | poppy | primrose
    | rose | snowdrop | sunflower | thistle | tulip | violet
clothes: apron | belt | beret | blouse | boots | bow tie | cap | cape | cardigan | cloak | dress | dungarees |
    gloves | gown | hood | jersey | jumper | kilt | mittens | overalls | pullover | pyjamas | raincoat | robe
    | sandals | shirt | shoes | skirt | slippers | socks | spectacles | suit | sweater | trousers | tunic |
    uniform | veil
day: Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | Sunday
month: January | February | March | April | May | June | July | August | September | October | November |
    December
season: spring | summer | autumn | winter
number: two | three | four | five | six | seven | eight | nine | ten | eleven | twelve | fourteen | fifteen |
    twenty | thirty | forty | fifty | sixty
kin: aunt | brother | cousin | daughter | father | grandfather | grandmother | great-aunt | mother | nephew |
    niece | sister | son | uncle | godmother | stepfather
went: walked | hurried | cycled | wandered | ran | drove | strolled | marched | crept | rode | limped |
    trudged | raced | climbed | returned
fixed: repaired | cleaned | polished | mended | painted | sold | borrowed | wrapped | weighed | sketched |
    measured | admired | examined | dropped | dusted | unlocked | emptied | labelled | photographed | moved |
    kept
said: said | replied | whispered | answered | murmured | shouted | added | explained | muttered | sighed |
    announced | called
asked: asked | wondered | enquired | demanded
watched: watched | listened | waited | nodded | smiled | frowned | laughed | blinked | shrugged | stared |
    yawned | sneezed | shivered | blushed | bowed | hesitated
weather: it had rained all night | the sun was low | snow lay on the roofs | a warm wind blew from the south |
    the fog had not yet lifted | the sky was the colour of slate | the frost had hardened the mud | the leaves
    were turning | a storm was on its way | the evening was mild and still | hail rattled on the tiles | the
    stars were out | the moon hung over the chimneys
when: one {season} evening | early one {day} | on the last {day} of {month} | late in {month} | at {number}
    o'clock | one cold {month} morning | on the first day of {season} | a week before the fair | a little
    after noon | long before sunrise | in the middle of {month}
room: attic | bathroom | bedroom | cellar | conservatory | corridor | hallway | kitchen | larder | nursery |
    pantry | parlour | porch | scullery | staircase | study | utility room | veranda
fault: had a loose hinge | would not open | was covered in dust | smelled of smoke | had been painted
    {quality} | was too heavy to lift | had lost its label | was not for sale | had a hole in the bottom | was
    cracked down the middle | made a strange noise | had gone missing | belonged to somebody else | was much
    smaller than it looked
snack: cheese | honey | pickles | chutney | ham | salmon | sausages | biscuits | muffins | scones | toast |
    porridge | noodles | dumplings | pancakes | custard | marmalade | yoghurt | almonds | walnuts | raisins |
    dates
clean: rinse | wash | scrub | wipe | dry | dust
chop: chop | cut | slice | dice | trim | peel
stir: stir | shake | heat | beat | knead | turn | mix
rub: rub | polish | dab | wipe | brush
cover: cover | wrap | pack | label
empty: empty | crowded | quiet | dark | silent | locked | almost deserted | noisy | bright
[story]
open: {when}, {hero} {went} to the {spot} with a {quality} {thing}. | {hero} {surname} was a {job} who lived
    near the {spot} in {place_name}. | {when}, {hero} found a {quality} {thing} behind the {spot}. | every
    {day}, {hero} {went} from the {place} to the {spot} with a {thing}. | when {hero} was {age}, {his} {kin}
    gave {him} a {quality} {thing}. | {hero} and {friend} had shared a {thing} since they were {age}. | nobody
    in {place_name} knew {hero}, but everybody knew the {quality} {thing} at the {spot}. | at {clock}, {hero}
    {went} to the {spot} to look for a {thing}.
then: {weather}, and {he} felt {feeling}. | {weather}, and the {spot} was {empty}. | {he} wore a {cloth} hat
    and carried {his} {clothes} in a bag. | {he} had eaten nothing but {snack} and {snack} since {day}. |
    {his} {kin} had once been a {job} there. | on the way, {he} saw {sight} and {sight}. | ~ | ~
turn: but the {thing} {fault}. | at the corner, {he} met a {mood} {job} with a {quality} {object}. | then
    {friend} came in and asked about the {thing}. | a {beast} had got in and knocked over the {object}. | the
    {job} at the door wanted {number} coins for the {thing}. | behind the {tree}, something moved {manner}. |
    {he} slipped on the step and hurt {his} {body}. | by mistake, {friend} {fixed} the wrong {thing}.
answer: {hero} {watched} but said nothing. | {hero} felt {feeling} and {watched}. | {he} sat down under the
    {tree} and thought for a while. | so {he} {fixed} the {quality} {object} instead. | {friend} {watched},
    and then {watched} again. | {he} asked {his} {kin} for help and {watched}. | they looked in the {room}, in
    the {room} and under the {object}. | ~
end: in the end, {he} gave the {thing} to {friend}. | by {day}, the {thing} was back at the {spot}. | after
    that, {hero} never went near the {spot} again. | {friend} {fixed} the {thing}, and they shared {snack} and
    {drink}. | to this day, the {thing} stands in the {room}. | it was {number} years before {he} told
    anybody. | that night, {hero} slept well for the first time since {month}. | {he} {went} home, {feeling}
    but no longer {feeling}.
[talk]
open: "have you seen my {quality} {thing}?" {asked} {hero}. | "where did you leave the {thing}?" {asked}
    {hero}. | "what is the matter with this {thing}?" {asked} {hero}. | "how much is the {quality} {thing}?"
    {asked} {hero}. | "may I borrow your {thing} until {day}?" {asked} {hero}. | "who put the {thing} in the
    {room}?" {asked} {hero}. | "whose {quality} {thing} is this?" {asked} {hero}.
then: "it was in the {room} on {day}," {said} {friend}. | "I think my {kin} took it to the {spot}," {said}
    {friend}. | "ask the {job} at the {spot}," {said} {friend}. | "it {fault}," {said} {friend}. | "not until
    you have {fixed} mine," {said} {friend}. | "it belongs to the {job}," {said} {friend}, and {watched}. |
    "that old {thing} {fault}," {said} {friend} {mood.ly}.
turn: "that is not what the {job} told me." | "then I shall have to buy a {quality} one." | "are you sure?"
    {hero} {watched}. | "you said the same about the {object}." | "I would rather have the {quality} one." |
    {hero} {watched} and put on {his} {clothes}. | "my {kin} will be {feeling} about this." | "I only want it
    for {number} minutes."
end: "come back in {month}," {said} {friend}. | "well, do not look at me," {said} {friend}. | {friend}
    {watched} {mood.ly}. | "let us look together," {said} {friend}, and they {went} to the {spot}. | "there is
    always the {object}," {said} {friend}. | "look behind the {object}," {said} {friend}. | ~
[scene]
open: the {spot} in {place_name} stands between a {place} and a {place}. | behind the {spot} there is a
    {quality} gate and a row of {tree} trees. | the {room} held a {quality} {object}, a {quality} {object} and
    a {thing}. | {when}, the {spot} was full of {flower.s} and {flower.s}. | from the window you could see the
    {spot}, the {place} and a single {tree}. | the market in {place_name} sells {object.s}, {object.s} and
    {snack}.
then: {weather}. | somebody had left a {quality} {object} beside the door. | the {flower.s} by the wall were
    {colour}, and the {flower.s} were {colour}. | a {job} and a {job} sat on the bench and shared their
    {snack}. | a {quality} {thing} hung on the wall above the {object}. | a {beast} slept in the shade of the
    {tree}. | in the distance there was {sight}.
turn: the {material} {box} by the door held {flower.s}. | the {object} {fault}. | {number} people lived there,
    and every one of them was a {job}. | children came every {season} to draw the {thing}. | old {surname}
    kept the key in a {material} {box}. | in {season}, it smelled of {flower.s}; in {season}, of smoke.
end: nobody knew who had made the {thing}. | it had been like that for {number} years. | on {day.s}, it was
    closed. | I have never seen a {place} so {empty}. | ~
[portrait]
open: {hero} {surname} is a {job} from {place_name}. | everybody in {place_name} knows {hero}, the {mood}
    {job} with {hair}. | {friend} has a {kin} called {hero}, who is a {job}. | {hero}, {his} {kin} and a
    {beast} live above the {spot}.
then: {he} has {hair} and {hair}. | {he} wears {colour} {pair} and a {cloth} hat, even in {month}. | at
    {old_age}, {he} is still fond of {hobby} and {hobby}. | {his} {kin} taught {him} {hobby}, and {his} {kin}
    taught {him} {hobby}.
turn: on {day.s} {he} walks to the {spot} with {friend}. | {he} is {mood} with children and {mood} with
    everyone else. | {he} cannot stand {snack}, but {he} loves {snack}. | {he} keeps a {quality} {thing} in a
    {material} {box}. | once, in {month}, {he} won a {thing} for {hobby}.
end: they say that {he} has never been to the {place}. | I have known {him} for {number} years. | {friend}
    thinks that {he} is {mood}, and I agree. | ~
[recipe]
open: to make a {dish} for {number}, start with the {chopped} and a little {spice}. | here is how to make a
    {bake}. | for a simple {dish}, you need {chopped}, {veg} and {spice}. | this {dish} comes from
    {place_name} and feeds {number}.
then: {clean} and {chop} everything before you begin. | heat a little butter in a {quality} pan. | warm the
    oven, and put on your apron. | weigh the flour and set it aside.
turn: then {stir} it all for {number} minutes. | add the {spice}, then the {spice}, and {stir} well. | cook it
    slowly until everything is soft. | after {number} minutes, taste it and add a pinch of {spice}. | do not
    {stir} it too hard.
end: finally, {cover} it and let it rest. | serve it with {side} and {drink}. | it tastes even better on
    {day}. | keep what is left in a {material} {box}. | ~
[repair]
open: to mend a {machine}, first take it apart {mood.ly}. | this is how to clean a {quality} {machine}. | if
    your {machine} makes a strange noise, do not throw it away. | a {machine} with a crack in it can often be
    saved.
then: {clean} every part and lay the parts on a cloth. | put on your {clothes} and clear the table. | set
    aside {number} minutes and fetch a {tool}. | {clean} the outside with warm water.
turn: then {rub} it {manner} with a piece of {cloth}. | fit a {metal} pin and tap it {manner}. | put a drop of
    oil on the {part_of}. | tighten the {part_of} and check the {part_of}. | if the {part_of} is worn, buy a
    new one.
end: leave it in the {room} until {day}. | {cover} it and keep it away from the light. | a good {job} can do
    it in {number} minutes. | if that fails, take it to {hero}. | ~
part_of: handle | hinge | lid | spring | strap | screw | clasp | base | lock | frame | hook | rim | wheel |
    joint | rivet | latch
tool: chisel | file | hammer | pair of pliers | saw | screwdriver | soft brush | spanner | tape measure | pot
    of glue | needle | vice | clamp
machine: alarm clock | bicycle | camera | cuckoo clock | cupboard | garden gate | hand drill | kettle | kite |
    lamp | lawnmower | locket | music box | pepper mill | pram | projector | puppet | radio | rocking chair |
    sewing machine | suitcase | toy train | typewriter | umbrella | watch | wheelbarrow | whisk | windmill
metal: brass | bronze | copper | iron | steel | tin
[garden]
open: to grow {flower.s}, choose a sunny corner of the garden. | {flower.s} do best in {month}. | plant a
    {tree} where it will have room. | the {flower.s} at the {spot} are {colour} this year.
then: dig the bed in {month} and {rake} it {manner}. | water it every {day} until {season}. | mix in some
    sand, leaves or ash. | do not plant it too near a {tree}. | put the seeds in a {material} {box} by the
    window.
turn: after {number} weeks, look for {colour} buds. | slugs love {flower.s}, so check the leaves. | cut back
    the {tree} and the {flower.s}. | if the frost comes, {cover} the bed.
end: by {season}, the whole bed will be {colour}. | {hero} won a prize for hers in {month}. | give some of the
    {flower.s} to a {job}. | ~
rake: rake | weed | turn | clear | level
[letter]
open: dear {friend}, thank you for the {quality} {thing}. | dear {friend}, I am writing from a {place} near
    {place_name}. | dear {friend}, your {kin} tells me that you have moved to {place_name}. | dear {friend}, I
    am sorry to hear about your {thing}. | {day}, {clock}. I have spent the day at the {spot} with {friend}.
then: we have had {number} days of {weather_word}, and the {flower.s} are {colour}. | my {kin} sends {snack}
    and good wishes. | yesterday a {beast} ran through the {room}. | the {job} says that the {thing} will be
    ready by {month}. | I feel {feeling}, but my {kin} is {feeling}. | this morning I saw {sight}.
turn: I shall be at the {spot} on {day} if the weather holds. | everyone here is {feeling}, except the {job}.
    | do you still have the {quality} {object} that I lent you? | I still hope to see the {place} before
    {season}. | bring your {clothes}, and do not forget the {object}. | ~
end: yours {mood.ly}, {hero}. | with love from {hero}. | more news in {month}. | your {kin}, {hero}. | ~
[notice]
open: lost near the {spot}: a {quality} {thing}. | for sale: one {quality} {thing}, made of {material}. |
    found in the {spot}: one {thing}, {colour} and {quality}. | notice: the {spot} will be closed from {day}
    until {day}. | wanted: a {skilled} {job} for the {spot} in {place_name}. | coming in {month} to the
    {spot}: an evening of {hobby} and {hobby}.
then: please ask for {hero} {surname} at the {place}. | call at the {place} after {clock}. | the price is
    {number} coins. | write to {hero}, the {job}, before {month}.
end: no {beast.s}, please. | bring {snack} and a {object}. | thank you for being patient. | signed, {hero}
    {surname}. | ~
[animal]
open: the {animal} is a {kind} that lives {habitat}. | {habitat}, with luck, you may see a {animal}. | of
    every {kind} in the book, {hero} liked the {animal} best. | look for the {animal} {habitat}.
then: it eats {food} and is known for its {trait}. | with its {trait}, the {animal} is easy to recognise. |
    the {animal} feeds on {food}, most of all in {season}. | {friend} once saw one near {place_name}. | what
    does a {animal} eat? It eats {food}.
end: few {animal.s} are seen before {month}. | a young {animal} is hard to find before {season}. | children in
    {place_name} like to draw {animal.s}. | if you meet a {animal}, be {mood} and keep still. | {number}
    {animal.s} were counted here in {month}. | ~
[worker]
open: a {worker} needs a good {tool}. | the {worker} of {place_name} was called {hero} {surname}. | {hero},
    who is a {worker}, starts work at {clock}. | ask any {worker}: the {tool} matters more than the
    {workplace}.
then: the {workplace} is full of {product} by {month}. | in the {workplace} there are {product} and a
    {quality} {tool}. | the {worker} looks after the {product}, and the {tool} is never far away. | without
    the {tool}, there would be no {product}.
end: {friend} came on {day} to ask about the {product}. | it takes {number} years to learn the trade. | the
    {worker} is {mood} in the morning and {mood} at night. | the {worker} keeps the {tool} in a {material}
    {box}. | ~
[use]
open: a {item} is for {use}. | for {use}, {hero} took the {item} from the {keep}. | {friend} bought a
    {quality} {item} in {place_name}. | what is a {item} for? It is for {use}.
then: you will find the {item} in the {keep}. | {hero} keeps one in the {keep}, next to the {object}. | {use}
    is easy with a good {item}. | the {item} in the {keep} {fault}. | without a {item}, {use} takes {number}
    minutes longer.
end: {his} {kin} made do with a {object} instead. | a {quality} one costs {number} coins. | never lend a
    {item} to a {job}. | it was a present from {friend}. | ~
""")
CORPUS_LEX = CORPUS.pop("words")

# Tables: one record each, with its fields in the order given. What a table says never changes, so the corpus
# holds facts that a model can learn. The documents of the section of that name are about one record.
TABLES: dict[str, tuple[Sequence[str], list[str]]] = {
    "animal": (
        ("animal", "kind", "habitat", "food", "trait"),
        parse("""
rows: heron; bird; beside rivers; fish; long legs | owl; bird; in hollow trees; mice; silent flight | otter;
    mammal; on river banks; fish; thick fur | badger; mammal; in a burrow called a sett; worms; striped face |
    fox; mammal; in a den; rabbits; bushy tail | mole; mammal; under the lawn; worms; strong claws | squirrel;
    mammal; in tall trees; nuts; quick leaps | bat; mammal; in caves and lofts; moths; sharp hearing | puffin;
    bird; on sea cliffs; small fish; bright beak | swan; bird; on lakes; water plants; curved neck | toad;
    amphibian; under damp stones; slugs; warty skin | newt; amphibian; in still ponds; tadpoles; orange belly
    | adder; reptile; on dry heaths; lizards; zigzag back | tortoise; reptile; in warm scrub; leaves; heavy
    shell | lizard; reptile; among sunny rocks; flies; shed tail | salmon; fish; in cold rivers; shrimps; long
    journeys | pike; fish; in weedy lakes; smaller fish; sharp teeth | eel; fish; in muddy streams; snails;
    snakelike body | crab; sea animal; in rock pools; scraps; sideways walk | lobster; sea animal; on the
    rocky seabed; mussels; large pincers | seal; mammal; along rocky coasts; squid; round eyes | whale;
    mammal; in the open ocean; krill; deep songs | dolphin; mammal; in warm seas; herring; clever games |
    octopus; sea animal; in underwater dens; crabs; eight arms | beetle; insect; under bark; rotten wood; hard
    wing cases | moth; insect; in gardens at night; nectar; feathery feelers | bee; insect; in a hive; nectar;
    winding dance | ant; insect; in a crowded nest; seeds; tireless work | wasp; insect; in a paper nest; ripe
    fruit; painful sting | spider; small hunter; in dark corners; flies; sticky web | wolf; mammal; in
    northern forests; deer; long howl | bear; mammal; in mountain woods; berries; winter sleep | camel;
    mammal; in dry deserts; thorny shrubs; great thirst | donkey; farm animal; in stony fields; hay; loud bray
    | goat; farm animal; on steep hills; brambles; sure feet | goose; farm bird; in farmyards; grass; fierce
    temper | hen; farm bird; in a coop; grain; brown eggs | raven; bird; on high crags; scraps; hoarse croak |
    robin; bird; in hedges; insects; red breast | swallow; bird; under barn roofs; flies; forked tail |
    pelican; bird; on warm coasts; fish; enormous beak | parrot; bird; in rainforests; nuts; gift for copying
    voices | penguin; bird; on icy shores; fish; upright walk | kangaroo; mammal; on dry plains; grass;
    powerful hind legs | elephant; mammal; on grassy plains; leaves; long memory
""")["rows"],
    ),
    "worker": (
        ("worker", "workplace", "product", "tool"),
        parse("""
rows: baker; bakery; loaves; oven | carpenter; workshop; chairs; plane | blacksmith; forge; horseshoes; hammer
    | tailor; shop; suits; needle | potter; studio; bowls; wheel | weaver; mill; cloth; loom | cobbler; shop;
    shoes; awl | gardener; greenhouse; seedlings; trowel | painter; studio; portraits; brush | printer; print
    room; posters; press | nurse; clinic; bandages; thermometer | dentist; surgery; fillings; drill | teacher;
    school; lessons; blackboard | librarian; library; catalogues; stamp | miller; windmill; flour; millstone |
    fisherman; harbour; nets; boat | shepherd; hill farm; lambs; crook | beekeeper; garden; honey; smoker |
    brewer; brewery; ale; barrel | clockmaker; shop; clocks; magnifying glass | surveyor; office; maps;
    theodolite | plumber; boiler room; pipes; wrench | glazier; yard; windows; glass cutter | bricklayer;
    building site; walls; trowel | jeweller; shop; rings; small torch | chemist; laboratory; medicines; burner
    | astronomer; observatory; star charts; telescope | sculptor; yard; statues; chisel | bookbinder;
    workshop; books; glue pot | barber; shop; haircuts; razor | lawyer; office; contracts; fountain pen |
    farmer; barn; crops; tractor | thatcher; village; roofs; rake | dyer; mill; bright wool; vat |
    cheesemaker; dairy; cheeses; curd knife | florist; shop; bouquets; ribbon | mechanic; garage; engines;
    spanner | electrician; workshop; circuits; screwdriver | journalist; newsroom; articles; notebook |
    confectioner; kitchen; toffees; pan
""")["rows"],
    ),
    "use": (
        ("item", "use", "keep"),
        parse("""
rows: kettle; boiling water; kitchen | broom; sweeping the floor; hallway | saw; cutting wood; shed | needle;
    sewing on buttons; parlour | ladder; reaching the roof; garage | spade; digging holes; shed | sieve;
    sifting flour; pantry | towel; drying wet hands; bathroom | pillow; resting a tired head; bedroom | pen;
    writing letters; study | mop; washing tiles; scullery | rake; gathering leaves; shed | corkscrew; opening
    bottles; kitchen | thermometer; taking a temperature; bathroom | telescope; watching the stars; attic |
    umbrella; staying dry; hallway | whisk; beating eggs; kitchen | comb; tidying hair; bathroom | candle;
    lighting a dark room; pantry | hammock; sleeping outdoors; garden | lawnmower; cutting grass; shed |
    bucket; carrying water; cellar | map; finding the way; study | iron; smoothing shirts; utility room |
    toaster; browning bread; kitchen | stapler; fastening pages; study | razor; shaving; bathroom | trowel;
    planting bulbs; greenhouse | grater; shredding cheese; kitchen | hose; watering plants; garden | axe;
    splitting logs; shed | ruler; drawing straight lines; study | pump; filling tyres; garage | net; catching
    fish; boathouse | lantern; walking at night; porch | duster; cleaning shelves; cupboard | magnifying
    glass; reading small print; study | rolling pin; flattening dough; pantry | ladle; pouring soup; kitchen |
    thimble; protecting a finger; parlour | anvil; shaping hot metal; forge | drill; making holes; garage |
    compass; finding north; rucksack | alarm clock; waking up early; bedroom | basin; soaking socks; scullery
    | calendar; counting the days; kitchen | sponge; scrubbing pans; kitchen | scales; weighing parcels; post
    office
""")["rows"],
    ),
}
GROUPS = ("open", "then", "turn", "answer", "end")
CORPUS_SHARES = {
    "story": 26,
    "talk": 13,
    "scene": 11,
    "portrait": 8,
    "recipe": 7,
    "repair": 6,
    "garden": 5,
    "letter": 9,
    "notice": 5,
    "animal": 5,
    "worker": 4,
    "use": 4,
}

# ---------------------------------------------------------------------------------------------------------
# Writers
# ---------------------------------------------------------------------------------------------------------

FLIP = {"+": "-", "-": "+"}
PLACE_NAMES = [start + end for start in CORPUS_LEX["town_start"] for end in CORPUS_LEX["town_end"]][::3]
TOPIC_LEX["place_name"] = PLACE_NAMES[::8]
CORPUS_LEX |= TOPIC_LEX
CORPUS_LEX |= {"place_name": PLACE_NAMES, "job": [row.split("; ")[0] for row in TABLES["worker"][1]]}
IRREGULAR = {
    "mouse": "mice",
    "wolf": "wolves",
    "goose": "geese",
    "salmon": "salmon",
    "bellows": "bellows",
    "radio series": "radio series",
    "stray dog": "stray dogs",
}


def plural(noun: str) -> str:
    """Regular English plurals, plus the few irregular ones that the word lists need."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def adverb(adjective: str) -> str:
    """The "-ly" form: happy -> happily, gentle -> gently."""
    if adjective.endswith("y"):
        return adjective[:-1] + "ily"
    return adjective[:-1] + "y" if adjective.endswith("le") else adjective + "ly"


FORMS = {"": str, "s": plural, "ly": adverb}


def finish(text: str) -> str:
    """Fix "a"/"an", start every sentence with a capital letter and end the text with a full stop."""
    text = re.sub(r"\b([Aa]) (?=(?!one|use|uni[^mn]|eu)[aeiou]|honest|hour)", r"\1n ", " ".join(text.split()))
    text = re.sub(r'(^|[.?!] )("?)([a-z])', lambda m: m[1] + m[2] + m[3].upper(), text)
    return text if text[-1] in '.?!"' else text + "."


def words(text: str) -> list[str]:
    """Lower-case words without punctuation: what two rows must differ in, and what the baselines see."""
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


class Writer:
    """Fills templates from a lexicon; within one text it avoids drawing the same option of a list twice."""

    def __init__(self, rng: random.Random, lexicon: dict[str, list[str]]) -> None:
        self.rng, self.lexicon = rng, lexicon
        self.bound: dict[str, str] = {}
        self.used: set[str] = set()

    def start(self, **bound: str) -> None:
        """Begin a new text in which the slots of these names are fixed."""
        self.bound, self.used = bound, set()

    def pick(self, name: str) -> str:
        options = self.lexicon[name]
        fresh = [option for option in options if f"{name}={option}" not in self.used]
        option = self.rng.choice(fresh or options)
        self.used.add(f"{name}={option}")
        return option

    def say(self, template: str) -> str:
        return re.sub(r"\{([^{}]+)\}", lambda match: self.slot(match[1]), template)

    def slot(self, key: str) -> str:
        name, _, form = key.partition(".")
        return FORMS[form](self.bound[name] if name in self.bound else self.say(self.pick(name)))


class Critic(Writer):
    """Writes reviews of a given polarity.

    Most reviews deny, concede or reverse something, so the words of the other polarity turn up in them as
    well. The label follows what the reviewer ends up asserting: the clause after "but", the main clause of
    an "although", the outcome of "I expected". `sign` is the polarity of the clause being written.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng, {})
        self.sign, self.kind, self.many = "+", "", False

    def start(self, domain: str = "", **bound: str) -> None:
        super().start(**bound)
        self.lexicon = REVIEW_LEX | DOMAINS[domain]
        self.bound |= {"thing": self.pick("thing"), "tense": self.rng.choice(["present", "past"])}

    def slot(self, key: str) -> str:
        base, _, side = key.rpartition("_")
        if base and side in ("s", "o"):
            return self.polar(base, self.sign if side == "s" else FLIP[self.sign])
        if key == "part":
            noun, self.kind = self.pick("part").split("/")
            self.many = noun.endswith("*")
            return noun.rstrip("*")
        if key == "was" or key == "be":
            past = key == "was" or self.bound["tense"] == "past"
            return ("were" if self.many else "was") if past else ("are" if self.many else "is")
        return super().slot(key)

    def polar(self, base: str, sign: str) -> str:
        """Fill a slot of the given polarity; slots inside it are relative to that polarity."""
        outer, self.sign = self.sign, sign
        if base == "adj":
            text = self.pick(self.kind + sign)
        elif base == "np":
            part = self.slot("part")
            text = f"the {self.polar('adj', sign)} {part}"
        elif base in ("clause", "main"):
            kinds = {"clause": ("plain", "denied"), "main": ("plain_main", "twist_main")}[base]
            text = self.say(self.pick(kinds[self.rng.random() > PLAIN_SHARE]))
        elif base in self.lexicon:
            text = self.say(self.pick(base))
        else:
            text = self.say(self.pick(base + sign))
        self.sign = outer
        return text

    def review(self, sign: str, domain: str | None = None) -> str:
        """One review sentence of 5 to 25 words; with a domain, it goes on with the review in progress."""
        while True:
            if domain is None:
                self.start(self.rng.choice(list(DOMAINS)))
            self.sign = sign
            form = self.rng.choices(list(REVIEW_FORMS), list(REVIEW_FORMS.values()))[0]
            text = finish(self.say(self.pick(form)))
            if 5 <= len(words(text)) <= 25:
                return text


class Reporter(Writer):
    """Writes topic sentences. The main clause alone decides the label.

    Most sentences also mention another topic, in a place that cannot decide it: a subordinate clause, a
    relative clause, an opening phrase, or an idiom that somebody quotes.
    """

    def slot(self, key: str) -> str:
        if key.startswith("P:"):
            person = super().slot(key[2:])
            past, self.past = self.past, ""
            return f"{person}, {past}," if past else person
        return super().slot(key)

    def about(self, topic: str, *entries: str, aside: bool = False, person: bool = False) -> str:
        """A text from these entries of the topic; asides name no time, and some openings need a person."""
        self.lexicon = TOPIC_LEX | TOPICS[topic]
        options = [option for entry in entries for option in self.lexicon[entry]]
        if person:
            options = [option for option in options if option.startswith("the {P:")]
        template = self.rng.choice(options)
        return self.say(template.replace(" {time_word}", "") if aside else template)

    def sentence(self, topic: str) -> str:
        """One sentence of at most 25 words that is mainly about the topic."""
        while len(words(text := self.draft(topic))) > 25:
            pass
        return text

    def draft(self, topic: str) -> str:
        rng = self.rng
        other = rng.choice([name for name in TOPICS if name != topic])
        device = rng.choices(list(TOPIC_DEVICES), list(TOPIC_DEVICES.values()))[0]
        self.start()
        self.past = ""
        if device == "reason":
            return finish(f"{self.about(topic, 'event')} because {self.about(other, 'reason')}")
        if device in ("before", "after"):
            main = self.about(topic, *rng.choices([["main"], ["bg"]], [0.8, 0.2])[0])
            aside = self.about(other, *rng.choices([["main"], ["bg"]], [0.4, 0.6])[0], aside=True)
            link = rng.choice(TOPIC_LEX["while"])
            return finish(f"{link} {aside}, {main}" if device == "before" else f"{main} {link} {aside}")
        if device == "past":
            self.past = f"who {rng.choice(['once', 'long ago', 'for years'])} {self.about(other, 'past')}"
            return finish(self.about(topic, "main", person=True))
        if device == "place":
            place = self.about(other, "place")
            return finish(f"{place}, {self.about(topic, 'main', person=True)}")
        main = self.about(topic, "main", "state")
        if device == "idiom":
            somebody = rng.choice(TOPIC_LEX["somebody"])
            return finish(f"{main}; {somebody} called it {self.about(other, 'idiom')}")
        if device == "news":
            talk = f"although {rng.choice(TOPIC_LEX['talk'])} {self.about(other, 'news')}"
            return finish(f"{talk}, {main}" if rng.random() < 0.5 else f"{main}, {talk}")
        return finish(main)


class Author(Writer):
    """Writes corpus documents; the people, the thing and the place stay the same through a document."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng, CORPUS_LEX)

    def document(self) -> str:
        rng = self.rng
        woman = rng.random() < 0.5
        hero, friend = (self.lexicon[name] for name in (("woman", "man") if woman else ("man", "woman")))
        he, him, his = ("she", "her", "her") if woman else ("he", "him", "his")
        self.start(
            hero=rng.choice(hero),
            friend=rng.choice(friend),
            he=he,
            him=him,
            his=his,
            thing=rng.choice(self.lexicon["object"]),
            spot=rng.choice(self.lexicon["place"]),
        )
        section = rng.choices(list(CORPUS_SHARES), list(CORPUS_SHARES.values()))[0]
        self.lexicon = CORPUS_LEX | CORPUS[section]
        if section in TABLES:
            fields, records = TABLES[section]
            self.bound |= dict(zip(fields, rng.choice(records).split("; "), strict=True))
        options = (rng.choice(CORPUS[section][group]) for group in GROUPS if group in CORPUS[section])
        return " ".join(finish(self.say(option)) for option in options if option != "~")


# ---------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------

Rows = list[tuple[str, int]]


def split_rows(write: Callable[[str], str], labels: Sequence[str], rng: random.Random) -> dict[str, Rows]:
    """Draw distinct rows, the same number for every label in every split, in shuffled order."""
    seen: set[tuple[str, ...]] = set()
    splits: dict[str, Rows] = {}
    for split, size in SIZES.items():
        rows: Rows = []
        for index in range(size):
            label = index % len(labels)
            while (key := tuple(words(text := write(labels[label])))) in seen:
                pass
            seen.add(key)
            rows.append((text, label))
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def make_tasks() -> dict[str, tuple[list[str], dict[str, Rows]]]:
    """Both tasks: label names (in label order) and rows by split."""
    critic = Critic(random.Random(f"{SEED} reviews"))
    reporter = Reporter(random.Random(f"{SEED} topics"), TOPIC_LEX)
    polarity = {"negative": "-", "positive": "+"}
    reviews = split_rows(lambda label: critic.review(polarity[label]), list(polarity), critic.rng)
    topics = split_rows(reporter.sentence, list(TOPICS), reporter.rng)
    return {"reviews": (list(polarity), reviews), "topics": (list(TOPICS), topics)}


def make_corpus(held_out: Iterable[str]) -> list[str]:
    """Distinct documents, none of which contains a held-out sentence."""
    rng = random.Random(f"{SEED} corpus")
    author, critic, reporter = Author(rng), Critic(rng), Reporter(rng, TOPIC_LEX)
    banned = [" ".join(words(text)) for text in held_out]
    documents: dict[str, None] = {}
    while len(documents) < CORPUS_DOCUMENTS:
        kind = rng.random()
        if kind < 0.2:
            sign, domain = rng.choice("-+"), rng.choice(list(DOMAINS))
            critic.start(domain)
            parts = [critic.review(sign, domain) for _ in range(rng.randint(2, 4))]
        elif kind < 0.4:
            topic = rng.choice(list(TOPICS))
            parts = [reporter.sentence(topic) for _ in range(rng.randint(2, 4))]
        else:
            parts = [author.document()]
        text = " ".join(parts)
        plain = " ".join(words(text))
        if not any(sentence in plain for sentence in banned):
            documents[text] = None
    return list(documents)


def write_files() -> None:
    """Write every data file beside this script, always with the same bytes."""
    tasks = make_tasks()
    for task, (labels, splits) in tasks.items():
        (HERE / task).mkdir(exist_ok=True)
        for split, rows in splits.items():
            lines = ["sentence\tlabel", *(f"{text}\t{labels[label]}" for text, label in rows)]
            (HERE / task / f"{split}.tsv").write_bytes(("\n".join(lines) + "\n").encode())
    splits_of = [splits for _, splits in tasks.values()]
    held_out = [text for splits in splits_of for text, _ in splits["dev"] + splits["test"]]
    data = ("\n".join(make_corpus(held_out)) + "\n").encode()
    with (
        open(HERE / "corpus.txt.gz", "wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
    ):
        packed.write(data)


# ---------------------------------------------------------------------------------------------------------
# Baselines
# ---------------------------------------------------------------------------------------------------------


def features(
    texts: Sequence[str], vocabulary: dict[str, int] | None, bigrams: bool
) -> tuple[np.ndarray, dict[str, int]]:
    """Count matrix of unigrams (and bigrams); without a vocabulary, make one of the terms seen twice."""
    bags = []
    for text in texts:
        tokens = ["<s>", *words(text), "</s>"]
        bags.append(tokens[1:-1] + [f"{a} {b}" for a, b in zip(tokens, tokens[1:], strict=False)] * bigrams)
    if vocabulary is None:
        counts: dict[str, int] = {}
        for term in (term for bag in bags for term in bag):
            counts[term] = counts.get(term, 0) + 1
        vocabulary = {term: index for index, term in enumerate(t for t, c in counts.items() if c > 1)}
    matrix = np.zeros((len(bags), len(vocabulary)), dtype=np.float32)
    for row, bag in enumerate(bags):
        for term in bag:
            if term in vocabulary:
                matrix[row, vocabulary[term]] += 1
    return matrix, vocabulary


def naive_bayes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial naive Bayes with add-one smoothing, as a linear scorer (weights, biases)."""
    counts = y.T @ x + 1
    return np.log(counts / counts.sum(1, keepdims=True)).T, np.log(y.mean(0))


def logistic_regression(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax regression with an L2 penalty, by full-batch gradient descent with momentum."""
    weights, bias = np.zeros((x.shape[1], y.shape[1]), np.float32), np.zeros(y.shape[1], np.float32)
    step_w, step_b = np.zeros_like(weights), np.zeros_like(bias)
    for _ in range(300):
        scores = x @ weights + bias
        odds = np.exp(scores - scores.max(1, keepdims=True))
        error = (odds / odds.sum(1, keepdims=True) - y) / len(x)
        step_w = 0.9 * step_w - 0.3 * (x.T @ error + 1e-3 * weights)
        step_b = 0.9 * step_b - 0.3 * error.sum(0)
        weights, bias = weights + step_w, bias + step_b
    return weights, bias


def print_baselines() -> None:
    """Train on the train split of each task and print dev and test accuracy as a table."""
    print("| task | model | features | dev | test |\n|---|---|---|---|---|")
    for task, (labels, splits) in make_tasks().items():
        texts = {split: [text for text, _ in rows] for split, rows in splits.items()}
        gold = {split: np.array([label for _, label in rows]) for split, rows in splits.items()}
        one_hot = np.eye(len(labels), dtype=np.float32)[gold["train"]]
        for bigrams in (False, True):
            x, vocabulary = features(texts["train"], None, bigrams)
            held = {split: features(texts[split], vocabulary, bigrams)[0] for split in ("dev", "test")}
            for name, fit in (("naive Bayes", naive_bayes), ("logistic regression", logistic_regression)):
                weights, bias = fit(x, one_hot)
                score = {s: 100 * np.mean((held[s] @ weights + bias).argmax(1) == gold[s]) for s in held}
                terms = "unigrams + bigrams" if bigrams else "unigrams"
                print(f"| {task} | {name} | {terms} | {score['dev']:.1f} | {score['test']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tinyld's bundled data, or score baselines on it.")
    parser.add_argument("--baseline", action="store_true", help="print what bag-of-words baselines get")
    if parser.parse_args().baseline:
        print_baselines()
    else:
        write_files()


if __name__ == "__main__":
    main()
