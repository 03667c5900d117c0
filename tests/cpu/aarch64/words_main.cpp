// Prints the words of vec.h that are wrong at this level; 1 if there is any.
namespace fused_attn {
int wrong_words();
}

int main() {
  return fused_attn::wrong_words() == 0 ? 0 : 1;
}
