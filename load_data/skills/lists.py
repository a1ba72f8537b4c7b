"""Find the list in a sentence: `Please buy milk, eggs and bread.` -> `['milk', 'eggs', 'bread']`.

English and Chinese; one to five things of one domain, in a sentence that contains other nouns too. The key is
the combination in any order, so a scored combination was in no training text, in any sentence. A list of one
thing also counts as a combination.
"""

import random

from load_data.skills.common import Sample, joined

COUNTS, COUNT_WEIGHTS = (1, 2, 3, 4, 5), (1, 3, 4, 2, 1)
FILLERS = {  # other words of the sentence
    "who": ("my sister", "our teacher", "the old man", "her brother", "a friend", "the neighbour", "Anna"),
    "where": ("in the kitchen", "on the table", "at home", "near the station", "behind the door", "in town"),
    "when": ("today", "tomorrow", "on Sunday", "after work", "this morning", "before dinner", "next week"),
    "谁": ("我妹妹", "老师", "爷爷", "邻居", "小王", "小李", "妈妈", "同事"),
    "哪里": ("在桌上", "在家里", "在门口", "在楼下", "在学校", "在路边"),
    "何时": ("今天", "明天", "周末", "下班后", "早上", "晚饭前"),
}
ENGLISH = {  # domain -> its things, and sentences that use them
    "food": (
        "milk eggs bread butter rice cheese apples bananas carrots potatoes onions tomatoes beans soup "
        "honey sugar salt flour coffee tea juice water lemons grapes pears peaches mushrooms pasta fish "
        "chicken nuts cookies chocolate yogurt spinach cabbage",
        "Please buy {}.|We need {} for the party {when}.|{who} wants {} {when}.|"
        "There is still {} {where}.|I ate {} with {who}.|The cook asked {who} for {}.",
    ),
    "animals": (
        "cats dogs horses cows sheep goats pigs ducks geese hens rabbits mice foxes wolves bears deer "
        "lions tigers monkeys elephants snakes frogs turtles owls eagles bees ants whales",
        "I saw {} {when}.|{who} takes care of {}.|The farm {where} has {}.|{who} draws {} {when}.|"
        "In this book there are {} and no people.",
    ),
    "tools": (
        "hammers nails screws saws pliers ropes ladders brushes buckets shovels rakes drills wires lamps "
        "keys knives scissors needles pens pencils rulers erasers notebooks folders tapes clips",
        "Bring {} to the office {when}.|{who} left {} {where}.|The box {where} holds {}.|"
        "We ran out of {}.|Can {who} lend us {} {when}?",
    ),
    "cities": (
        "Paris London Rome Berlin Madrid Vienna Prague Oslo Athens Lisbon Dublin Cairo Delhi Tokyo Seoul "
        "Beijing Shanghai Sydney Toronto Boston Chicago Lima Nairobi Moscow Istanbul Bangkok Hanoi Geneva",
        "The train stops in {}.|{who} has friends in {}.|We will visit {} with {who}.|"
        "Flights to {} are late {when}.|{who} once lived in {}.",
    ),
}
CHINESE = {
    "food": (
        "苹果 牛奶 面包 鸡蛋 大米 香蕉 土豆 番茄 白菜 胡萝卜 洋葱 蘑菇 豆腐 牛肉 鸡肉 鱼 虾 面条 饺子 "
        "包子 茶 咖啡 果汁 水 盐 糖 醋 酱油 葡萄 西瓜 梨 桃子 橙子 柠檬 花生 饼干",
        "我要买{}。|请帮我买{}。|{何时}的晚饭需要{}。|{谁}{何时}想吃{}。|{谁}去超市买了{}。|厨房里还有{}。",
    ),
    "animals": (
        "猫 狗 马 牛 羊 猪 鸡 鸭 鹅 兔子 老鼠 狐狸 狼 熊 鹿 狮子 老虎 猴子 大象 蛇 青蛙 乌龟 鹰 蜜蜂 "
        "蚂蚁 鲸鱼 熊猫 骆驼",
        "{何时}我看见了{}。|{谁}养了{}。|农场里有{}。|{谁}喜欢画{}。|这本书里有{}，没有人。",
    ),
    "tools": (
        "锤子 钉子 锯子 钳子 绳子 梯子 刷子 水桶 铲子 电线 灯泡 钥匙 剪刀 针 铅笔 钢笔 尺子 橡皮 本子 "
        "胶带 雨伞 毛巾 牙刷 肥皂 杯子 盘子 勺子 筷子",
        "{何时}把{}带到办公室。|{谁}把{}忘{哪里}了。|箱子里装着{}。|我们没有{}了。|{谁}能借我{}吗？",
    ),
    "cities": (
        "北京 上海 广州 深圳 成都 重庆 杭州 南京 武汉 西安 天津 苏州 青岛 大连 厦门 昆明 长沙 郑州 济南 "
        "福州 巴黎 伦敦 罗马 柏林 东京 首尔 悉尼 纽约",
        "火车经过{}。|{谁}去过{}。|我们{何时}飞往{}。|{谁}在{}有朋友。|{何时}{}都会下雨。",
    ),
}


def make(rng: random.Random) -> Sample:
    """Draw a sentence in one of the two languages."""
    language = rng.choice((ENGLISH, CHINESE))
    words, sentences = language[rng.choice(sorted(language))]
    things = rng.sample(words.split(), rng.choices(COUNTS, COUNT_WEIGHTS)[0])
    signs = (", ", " and ") if language is ENGLISH else ("、", rng.choice("和、"))
    fillers = {name: rng.choice(options) for name, options in FILLERS.items()}
    question = rng.choice(sentences.split("|")).format(joined(things, *signs), **fillers)
    question = question[0].upper() + question[1:]
    return Sample("lists: " + ", ".join(sorted(things)), question, repr(things))
